"""The benchmark of a training step runs to its end and compares equal computations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_is_compared_with_transformers(repo_root: Path, tmp_path: Path, precision: str) -> None:
    out = tmp_path / "table.json"
    command = [sys.executable, str(repo_root / "benchmarks" / "vs_transformers.py"), "--model", "1M", "--rounds", "1"]
    command += ["--seq-length", "16", "--micro-batch-size", "1", "--precision", precision, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    assert [row["side"] for row in rows] == ["ours", "transformers + DeepSpeed", "transformers, plain loop"]
    assert rows[0]["time of ours"]["median"] == 1
    assert all(row["peak of ours"] > 0 for row in rows)
