"""Logits and weights of imported models against transformers, for every family and the features they combine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megatron_prune.architecture import tensor_specs
from megatron_prune.checkpoint.hf import SourceWeights, export_hf, read_architecture, read_config, verify_export
from megatron_prune.model import CausalLM, logical_shapes
from megatron_prune.ops.dispatch import torch_ops

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
ODD = {"hidden_size": 30, "num_attention_heads": 4, "head_dim": 10}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", {}),
    "llama-mha-tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-wide-heads": ("llama", {"head_dim": 12}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "mistral-odd": ("mistral", ODD | {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2-gqa": ("qwen2", {}),
    "qwen2-tied-mha": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2-odd": ("qwen2", ODD),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN | {"attention_factor": 0.8, "truncate": False}}),
    "qwen3-gqa": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-odd-biases": ("qwen3", ODD | {"attention_bias": True}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
}


def make_stock(family: str, overrides: dict[str, Any]) -> Any:
    """A random transformers model whose every parameter, norms and biases included, is away from 0 and 1."""
    settings = SMALL | overrides
    config = transformers.AutoConfig.for_model(family, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.2, generator=generator))
    return model.eval()


def import_model(path: Path) -> tuple[CausalLM, dict[str, Tensor]]:
    arch = read_architecture(path)
    source = SourceWeights(path, arch)
    weights = {name: source.tensor(name) for name in source.names()}
    model = CausalLM(arch, logical_shapes(arch), torch_ops())
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model, weights


@pytest.mark.parametrize("case", CASES)
def test_logits_and_weights_survive_the_round_trip(case: str, tmp_path: Path) -> None:
    stock = make_stock(*CASES[case])
    stock.save_pretrained(tmp_path / "source")
    arch = read_architecture(tmp_path / "source")
    ours, weights = import_model(tmp_path / "source")
    tokens = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = stock(input_ids=tokens).logits, ours(tokens)
    assert (expected - actual).abs().max() <= 1e-4
    assert expected.std() > 0.1  # the comparison is not one of zeros

    report = export_hf(
        tmp_path / "export",
        arch,
        weights,
        dtype=torch.float32,
        tokenizer_dir=None,
        source_config=read_config(tmp_path / "source"),
        max_shard_bytes=20_000,
    )
    assert len(report.shards) > 1
    assert report.num_parameters == arch.num_parameters() == sum(tensor.numel() for tensor in weights.values())
    proof = verify_export(tmp_path / "export", arch, weights)
    assert proof.num_tensors == len(tensor_specs(arch))
    assert proof.max_abs_logit_difference <= 1e-4
    assert read_architecture(tmp_path / "export") == arch
    again = SourceWeights(tmp_path / "export", arch)
    for name, tensor in weights.items():
        assert torch.equal(again.tensor(name).view(torch.int32), tensor.view(torch.int32)), name
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sources_are_read_as_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    make_stock("qwen3", {}).to(dtype).save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert (tmp_path / "source" / "model.safetensors.index.json").exists()
    ours, weights = import_model(tmp_path / "source")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    tokens = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
    load = transformers.AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        expected = load(tmp_path / "source", dtype=torch.float32)(input_ids=tokens).logits
        assert (expected - ours(tokens)).abs().max() <= 1e-4
        # In the model dtype itself the two agree as far as the order of rounding allows.
        low = load(tmp_path / "source")(input_ids=tokens).logits
        assert low.dtype == dtype
        assert (low.float() - ours.to(dtype)(tokens).float()).abs().mean() <= 0.02 * expected.abs().mean()
