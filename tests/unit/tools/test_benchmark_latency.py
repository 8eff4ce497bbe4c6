"""The tool that times an export."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from megatron_prune.pruning.cost import LatencyTable
from megatron_prune.training.latency import write_table


def run(repo_root: Path, *arguments: str) -> int:
    tool = runpy.run_path(str(repo_root / "tools" / "benchmark_latency.py"))
    code: int = tool["main"](arguments)
    return code


def test_an_export_is_timed_beside_what_was_expected(
    repo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "export")
    times = np.array([[[1.0, 2.0]], [[3.0, 4.0]]])
    write_table(tmp_path, LatencyTable.of(((4, 12), (12,), (1, 3)), times, {"context": 9, "precision": "fp32"}))
    assert run(repo_root, str(tmp_path / "export"), "--context", "7", "--predict", str(tmp_path)) == 0
    timed, expected = capsys.readouterr().out.splitlines()
    assert " ms a token, 7 tokens of context, " in timed
    assert expected == "2.500 ms expected after 9 tokens of context in fp32"


def test_a_run_without_a_table_is_named(repo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, '
        '"num_attention_heads": 2, "vocab_size": 9}'
    )
    assert run(repo_root, str(tmp_path), "--predict", str(tmp_path / "none")) == 2
    assert "has no latency.json" in capsys.readouterr().err
    assert run(repo_root, str(tmp_path), "--context", "0") == 2
    assert "--context 0 must be 1 or more" in capsys.readouterr().err
