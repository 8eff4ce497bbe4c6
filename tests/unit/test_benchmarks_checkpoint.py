"""The benchmark of checkpoints runs to the end; it judges sizes here, times nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_a_checkpoint_has_twelve_bytes_per_live_parameter(repo_root: Path, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo_root)}
    flags = ["--hidden", "64", "--layers", "2", "--rounds", "2", "--directory", str(tmp_path), "--json", str(file)]
    command = [sys.executable, str(repo_root / "benchmarks" / "checkpoint.py"), *flags]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    _, head, line = finished.stdout.splitlines()
    assert "stall/save" in head
    assert line.split()[0] == "64"
    (row,) = json.loads(file.read_text())["rows"]
    assert 1 <= float(row["bytes/12 per parameter"]) < 1.01
    assert row["live (M)"] == (60 * (8192 + 1) + 2 * (4 * 60 * 64 + 3 * 60 * 256 + 2 * 60)) / 1e6
    assert list(tmp_path.iterdir()) == [file]
