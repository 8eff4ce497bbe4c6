"""The benchmarks of kernels and decisions run to the end and print what they promise; no time is judged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prune.ops.saliency import load_csrc

KERNEL_RATIOS = ("kernel_to_floor", "eager_to_kernel", "compile_to_kernel", "fallback_to_kernel")
PARTS = ("saliency ms", "communication ms", "choice ms")


def run(repo_root: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo_root)}
    command = [sys.executable, str(repo_root / "benchmarks" / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def kernels_are_built() -> bool:
    try:
        load_csrc("cpu")
    except ImportError:
        return False
    return True


def test_kernels_prints_every_ratio(repo_root: Path, tmp_path: Path) -> None:
    """Where the kernels could not be built it says so in one line instead."""
    file = tmp_path / "kernels.json"
    arguments = ("--shapes", "8x64", "--dtypes", "fp32+bf16", "--rounds", "3", "--json", str(file))
    finished = run(repo_root, "kernels.py", *arguments)
    if not kernels_are_built():
        assert finished.returncode == 2
        assert re.fullmatch(r"kernels\.py: megatron_prune\._C is not built.*\n", finished.stderr)
        return
    assert finished.returncode == 0, finished.stderr
    _, head, line = finished.stdout.splitlines()
    for column in ("kernel ms", "kernel/floor", "eager/kernel", "compile/kernel", "fallback/kernel", "target"):
        assert column in head
    assert line.split()[:2] == ["8x64", "fp32+bf16"]
    (row,) = json.loads(file.read_text())["rows"]
    for name in KERNEL_RATIOS:
        assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]


def test_decision_cost_splits_every_case(repo_root: Path, tmp_path: Path) -> None:
    file = tmp_path / "decision.json"
    sizes = ("--hidden", "64", "128", "--layers", "1", "3", "--dp", "1", "2")
    finished = run(repo_root, "decision_cost.py", *sizes, "--rounds", "3", "--json", str(file))
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert [line.split()[:3] for line in lines[2:]] == [
        ["64", "1", "1"],
        ["128", "1", "1"],
        ["64", "3", "1"],
        ["64", "1", "2"],
    ]
    rows = json.loads(file.read_text())["rows"]
    assert [row["scored/base"] for row in rows] == [1, 4, 3, 1]
    for row in rows:
        assert f"{row['decision ms']:.2f}" in finished.stdout
        assert all(row[part] > 0 for part in PARTS)
    assert rows[0]["decision/base"] == {"low": 1, "median": 1, "high": 1}


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("kernels.py", ("--shapes", "8by64"), "8by64 is not a matrix; write ROWSxCOLUMNS"),
        ("decision_cost.py", ("--hidden", "100"), "--hidden 100: give multiples of 64"),
    ],
)
def test_wrong_sizes_are_explained(repo_root: Path, script: str, arguments: tuple[str, ...], message: str) -> None:
    finished = run(repo_root, script, *arguments)
    assert finished.returncode == 2
    assert message in finished.stderr


@pytest.mark.parametrize("script", ["gpu_kernels.py", "gpu_step.py"])
def test_without_a_gpu_one_line_says_so(repo_root: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hides any
    finished = run(repo_root, script)
    assert finished.returncode == 2
    (line,) = finished.stdout.splitlines()
    assert line.startswith(f"{script} needs an NVIDIA GPU")
