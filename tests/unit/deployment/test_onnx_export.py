"""ONNX: onnxruntime says what transformers says, at odd widths, lengths and batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from megatron_prune.deployment.onnx_export import CHECKED, export_onnx
from megatron_prune.errors import MegatronPruneError, UserError


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=101,
        hidden_size=35,
        intermediate_size=53,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=None,
        tie_word_embeddings=True,
        initializer_range=0.3,
        max_position_embeddings=64,
    )
    directory = tmp_path_factory.mktemp("model")
    MistralForCausalLM(config).save_pretrained(directory)
    return directory


def test_parity(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = export_onnx(export, tmp_path / "deep" / "model.onnx")
    assert report.positions == sum(batch * length for batch, length in CHECKED)
    assert report.max_abs_logit_difference < 1e-3
    session = onnxruntime.InferenceSession(str(report.file))
    assert session.run(None, {"input_ids": np.zeros((5, 3), np.int64)})[0].shape == (5, 3, 101)

    class Liar:
        def run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [-output for output in session.run(names, feed)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: Liar())
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: type("Program", (), {"save": lambda self, name: None})())
    with pytest.raises(MegatronPruneError, match="differs at"):
        export_onnx(export, tmp_path / "other.onnx")


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no config.json"):
        export_onnx(tmp_path, tmp_path / "model.onnx")
