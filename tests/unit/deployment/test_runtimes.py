"""What other runtimes accept, against those runtimes' own rules where they can be asked."""

from __future__ import annotations

import dataclasses
from typing import Any

import gguf
import numpy as np
import pytest

from megatron_prune.architecture import Architecture
from megatron_prune.config.values import parse_source_shape
from megatron_prune.deployment.runtimes import BLOCK_K, BLOCK_Q8_0, Finding, check_targets, matrices, report
from megatron_prune.errors import UserError

PAPER = "hidden=1195,ffn=3006,heads=19,head_dim=64,layers=24,vocab=49152,tied=1"
ALIGNED = "hidden=1280,ffn=3072,heads=20,head_dim=64,layers=24,vocab=49152,tied=1"


def found(arch: Architecture | str, runtime: str) -> dict[str, Finding]:
    shape = parse_source_shape(arch) if isinstance(arch, str) else arch
    return {finding.topic: finding for finding in check_targets(shape, [runtime])}


def test_the_papers_shape() -> None:
    vllm, llama = found(PAPER, "vllm"), found(PAPER, "llama.cpp")
    assert [vllm[f"TP {size}"].verdict for size in (1, 2, 4, 8)] == ["yes", "no", "no", "no"]
    assert vllm["TP 4"].reason == "19 heads are no multiple of 4; ffn 3006 is no multiple of 4"
    assert (vllm["int8 W8A8, TP 1"].verdict, vllm["4-bit Marlin, TP 1"].verdict) == ("but", "no")
    assert llama["class"].verdict == llama["f16, f32"].verdict == "yes"
    # o_proj alone, 24 * 1195 * 1216 of 456.9M, has rows in blocks.
    assert "8% of weights are q8_0" in llama["q8_0"].reason
    assert "o_proj" not in llama["q8_0"].reason
    assert "0% of weights are K-quants" in llama["K-quants"].reason
    assert found(PAPER, "transformers")["class"].reason.startswith("MistralForCausalLM")


def test_an_aligned_shape_is_taken_as_it_is() -> None:
    findings = check_targets(parse_source_shape(ALIGNED), ["vllm", "llama.cpp", "transformers", "onnx"])
    assert [finding.topic for finding in findings if finding.verdict != "yes"] == ["TP 8", "tokenizer"]


@pytest.mark.parametrize("width", [63, 64, 119, 256, 1195, 1216, 3006, 3008])
def test_blocks_are_those_of_the_gguf_package(width: int) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0] == BLOCK_Q8_0
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_K][0] == BLOCK_K
    shape = f"hidden={width},ffn=64,heads=1,head_dim=64,layers=1,vocab=64,tied=1"
    fits = "q_proj" not in found(shape, "llama.cpp")["q8_0"].reason
    try:
        gguf.quants.quantize(np.zeros((2, width), np.float32), gguf.GGMLQuantizationType.Q8_0)
    except gguf.quants.QuantError:
        assert not fits
    else:
        assert fits


def test_llama_refuses_in_transformers_what_is_exported_as_mistral() -> None:
    import transformers

    about: dict[str, Any] = {"hidden_size": 1195, "intermediate_size": 3006, "num_attention_heads": 19, "head_dim": 64}
    with pytest.raises(Exception, match="not a multiple of the number of attention heads"):
        transformers.LlamaConfig(**about)
    assert transformers.MistralConfig(**about).head_dim == 64


def test_heads_on_several_gpus() -> None:
    grouped = "hidden=896,ffn=4864,heads=14,kv_heads=2,layers=2,vocab=151936,tied=1,qkv_bias=1"
    vllm = found(grouped, "vllm")
    assert [vllm[f"TP {size}"].verdict for size in (1, 2, 4)] == ["yes", "yes", "no"]
    eight = found("hidden=64,ffn=64,heads=8,kv_heads=2,layers=1,vocab=64", "vllm")
    assert eight["TP 8"].reason == "K/V heads on several GPUs each"
    assert found("hidden=96,ffn=64,heads=6,kv_heads=3,layers=1,vocab=64", "vllm")["TP 2"].verdict == "no"


def test_a_pruned_qwen2_and_biases() -> None:
    odd = parse_source_shape("hidden=890,ffn=64,heads=14,kv_heads=2,head_dim=64,layers=2,vocab=64,qkv_bias=1")
    assert found(odd, "vllm")["Qwen2"].verdict == found(odd, "llama.cpp")["class"].verdict == "no"
    biased = dataclasses.replace(parse_source_shape(PAPER), out_bias=True)
    assert "Seed-OSS" in found(biased, "llama.cpp")["class"].reason


def test_groups_of_different_size_are_judged_as_exported() -> None:
    arch = parse_source_shape("hidden=64,ffn=64,heads=3,head_dim=32,layers=1,vocab=64")
    uneven = dataclasses.replace(arch, kv_groups=((2, 1),))
    assert matrices(uneven)["k_proj, v_proj"] == (96, 64)
    assert found(uneven, "transformers")["K/V heads"].verdict == "but"


def test_matrices_make_up_the_model() -> None:
    arch = parse_source_shape("hidden=70,ffn=50,heads=6,kv_heads=2,head_dim=8,layers=3,vocab=90,tied=1")
    total = 0
    for kind, (rows, columns) in matrices(arch).items():
        total += rows * columns * (1 if kind.startswith("embedding") else arch.num_layers * (1 + ("," in kind)))
    assert total + 70 * (2 * 3 + 1) == arch.num_parameters()


def test_lines_say_where_a_rule_comes_from() -> None:
    lines = report(check_targets(parse_source_shape(PAPER), ["vllm", "llama.cpp"]))
    assert lines[0] == "vllm:"
    assert "  [1] vllm-project/vllm 0035bdf, llama.py: LlamaAttention, LlamaMLP" in lines
    with pytest.raises(UserError, match="'trt' is unknown; there are transformers, vllm"):
        check_targets(parse_source_shape(PAPER), ["trt"])
