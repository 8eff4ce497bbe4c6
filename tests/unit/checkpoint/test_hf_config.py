"""config.json in both spellings, defaults, refusals, and the family an export takes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import transformers

from megatron_prune.architecture import Architecture, Rope, uniform_kv_groups
from megatron_prune.checkpoint.hf_config import (
    DEFAULTS,
    architecture_from_hf,
    export_model_type,
    hf_config_from_architecture,
)
from megatron_prune.errors import UserError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
}
QWEN = {"model_type": "qwen3", "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("family", DEFAULTS)
def test_defaults_are_those_of_the_transformers_class(family: Any) -> None:
    stock = transformers.AutoConfig.for_model(family)
    arch = architecture_from_hf({"model_type": family})
    assert arch.hidden_size == stock.hidden_size
    assert arch.ffn_hidden_size == stock.intermediate_size
    assert arch.num_layers == stock.num_hidden_layers
    assert arch.num_attention_heads == stock.num_attention_heads
    assert arch.num_query_groups == stock.num_key_value_heads
    assert arch.head_dim == getattr(stock, "head_dim", 128)
    assert arch.vocab_size == stock.vocab_size
    assert arch.max_position_embeddings == stock.max_position_embeddings
    assert arch.norm_eps == stock.rms_norm_eps
    assert arch.rope == Rope(stock.rope_parameters["rope_theta"], stock.rope_parameters["rope_type"])
    assert arch.tie_embeddings == stock.tie_word_embeddings
    assert arch.sliding_window == getattr(stock, "sliding_window", None)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500.0, "rope_scaling": YARN},
        {"rope_theta": 500.0, "rope_scaling": {"type": "yarn", **{k: YARN[k] for k in YARN if k != "rope_type"}}},
        {"rope_parameters": YARN | {"rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": YARN | {"original_max_position_embeddings": None},
         "original_max_position_embeddings": 512},
        {"rope_theta": 500.0, "rope_scaling": YARN | {"factor": None}, "max_position_embeddings": 2048},
    ],
)  # fmt: skip
def test_rope_spellings_mean_the_same(spelling: dict[str, Any]) -> None:
    expected = Rope(500.0, "yarn", (("factor", 4.0), ("original_max_position_embeddings", 512)))
    assert architecture_from_hf(LLAMA | spelling).rope == expected


def test_rope_context_defaults_to_the_models() -> None:
    arch = architecture_from_hf(LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}})
    assert dict(arch.rope.options)["original_max_position_embeddings"] == 2048


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        ({"num_attention_heads": 5}, "hidden_size=32 is no multiple of num_attention_heads=5"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"hidden_size": "32"}, "hidden_size must be a positive integer, not '32'"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, not 0"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a positive number"),
        ({"rope_theta": "big"}, "rope_theta must be a positive number"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "needs a positive number for 'factor'"),
        ({"rope_scaling": 3}, "rope_scaling must be an object"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "differs between layer types"),
        (QWEN | {"use_sliding_window": True, "max_window_layers": 1}, "layers of different kinds"),
        (QWEN | {"layer_types": ["full_attention", "sliding_attention"]}, "different kinds"),
        (QWEN | {"layer_types": ["sliding_attention"] * 2}, "layer_types says sliding_attention"),
        (QWEN | {"layer_types": ["linear_attention"] * 2}, "linear_attention"),
    ],
)
def test_refusals_are_one_clear_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        architecture_from_hf(LLAMA | changes)
    assert "\n" not in str(caught.value)


def test_windows_of_each_family() -> None:
    qwen = QWEN | {"model_type": "qwen2", "sliding_window": 9}
    late = qwen | {"use_sliding_window": True, "max_window_layers": 2}
    assert architecture_from_hf(LLAMA | qwen).sliding_window is None
    assert architecture_from_hf(LLAMA | late).sliding_window is None
    assert architecture_from_hf(LLAMA | qwen | {"use_sliding_window": True, "max_window_layers": 0}).sliding_window == 9
    mistral = {"model_type": "mistral", "num_key_value_heads": None}
    assert architecture_from_hf(LLAMA | mistral).sliding_window == 4096
    assert architecture_from_hf(LLAMA | mistral | {"sliding_window": None}).sliding_window is None


def llama(hidden: int, **changes: Any) -> Architecture:
    base = Architecture("llama", 2, hidden, 48, 4, uniform_kv_groups(2, 4, 2), 8, 97)
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    ("arch", "model_type"),
    [
        (llama(32), "llama"),
        (llama(30), "mistral"),
        (llama(32, qkv_bias=True, out_bias=True), "llama"),
        (llama(30, qkv_bias=True, out_bias=True), "seed_oss"),
        (llama(30, mlp_bias=True), "seed_oss"),
        (llama(30, family="qwen2", qkv_bias=True), "qwen2"),
        (llama(30, family="qwen3", qk_norm=True), "qwen3"),
        (llama(32, family="mistral"), "mistral"),
    ],
)
def test_export_family(arch: Architecture, model_type: str) -> None:
    assert export_model_type(arch) == model_type
    config = json.loads(json.dumps(hf_config_from_architecture(arch, torch_dtype="float32", extra={})))
    stock = transformers.AutoConfig.for_model(**config)
    assert type(stock).__name__.lower() == model_type.replace("_", "") + "config"
    assert stock.head_dim == 8
    assert (stock.bos_token_id, stock.eos_token_id, stock.pad_token_id) == (None, None, None)
    if model_type in DEFAULTS:
        expected = dataclasses.replace(arch, family=model_type)  # type: ignore[arg-type]
        assert architecture_from_hf(config) == expected


def test_export_of_uneven_groups_counts_one_kv_head_per_query() -> None:
    config = hf_config_from_architecture(llama(32, kv_groups=((3, 1), (2, 2))), torch_dtype="bfloat16", extra={})
    assert config["num_key_value_heads"] == 4
    assert config["torch_dtype"] == "bfloat16"


def test_only_what_says_nothing_of_the_shape_is_carried() -> None:
    source = {"eos_token_id": [5, 6], "hidden_size": 999, "auto_map": {"x": "y"}, "layer_types": ["full_attention"]}
    config = hf_config_from_architecture(llama(32), torch_dtype="float32", extra=source)
    assert config["eos_token_id"] == [5, 6]
    assert config["bos_token_id"] == 1  # what a Llama config means by leaving it out
    assert config["hidden_size"] == 32
    assert not {"auto_map", "layer_types"} & set(config)
