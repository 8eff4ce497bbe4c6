"""A tiny study by its tool: interrupted and resumed, it gives what one that ran through gives, byte by byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

STUDY = """
tokenizer: examples/demo/source
input: ["megatron_prune/data/*.py", "megatron_prune/pruning/*.py"]
split: "80,20,0"
seeds: [1]
evaluation: {samples: 8, questions: 4}
settings: {seq_length: 32, global_batch_size: 4, micro_batch_size: 2, precision: fp32, train_iters: 14, lr: 1.0e-3,
           lr_warmup_iters: 1}
pruning: {prune_ratio: "4:1", prune_align: 8}
sources:
  tiny: {shape: {hidden_size: 16, ffn_hidden_size: 24, num_attention_heads: 2, num_layers: 2}, budget: 34K}
rows:
  unified: {goal: budget, trace: true}
  direct-searched: {start: searched}
  alone-taylor: {goal: budget, alone: true, settings: {few_shot_samples: 4}}
"""
RUNS = 4
SECONDS = 240


def _start(root: Path, study: Path, folder: Path) -> subprocess.Popen[str]:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background is born deaf to it
    command = [sys.executable, "tools/study.py", "--config", study, "--runs", folder, "--docs", folder / "docs"]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=root,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output
    return output


def _interrupted(process: subprocess.Popen[str]) -> str:
    """Ctrl-C, to the whole session as a terminal sends it, once the source is finished."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(f"[1/{RUNS}]"):
            os.killpg(process.pid, signal.SIGINT)
    assert process.wait(SECONDS) == 130, "".join(lines)
    return "".join(lines)


@pytest.mark.timeout(3 * SECONDS)
def test_the_same_numbers_again_interrupted_or_not(repo_root: Path, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(STUDY)
    through = _finish(_start(repo_root, study, tmp_path / "one"))
    assert f"[{RUNS}/{RUNS}]" in through
    assert "the same command continues" in _interrupted(_start(repo_root, study, tmp_path / "two"))
    assert not (tmp_path / "two" / "results.json").exists()
    resumed = _finish(_start(repo_root, study, tmp_path / "two"))
    assert "runs are finished already" in resumed
    for name in ("results.json", "docs/study.md", "docs/study_saliency.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert not list(tmp_path.glob("*/tiny/*/*/checkpoints")), "what is not needed any more is removed"
