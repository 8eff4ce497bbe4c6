"""Exports: odd shapes in stock transformers, expanded K/V, the proof, and safe replacement."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_prune.architecture import Architecture, tensor_specs, uniform_kv_groups
from megatron_prune.checkpoint import hf_export
from megatron_prune.checkpoint.hf import ExportReport, export_hf, has_weights, read_config, verify_export
from megatron_prune.errors import MegatronPruneError, UserError
from megatron_prune.model import CausalLM, logical_shapes
from megatron_prune.ops.dispatch import torch_ops

ODD = Architecture("llama", 2, 119, 301, 7, uniform_kv_groups(2, 7, 7), 16, 90, tie_embeddings=True)
INDIVISIBLE = dataclasses.replace(ODD, hidden_size=118)
UNEVEN = dataclasses.replace(INDIVISIBLE, kv_groups=((3, 3, 1), (2, 5)))


def random_weights(arch: Architecture) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    weights = {}
    for spec in tensor_specs(arch):
        mean = 0.5 if len(spec.axes) == 1 else 0.0
        weights[spec.name] = torch.empty(arch.tensor_shape(spec)).normal_(mean, 0.1, generator=generator)
    return weights


def export(directory: Path, arch: Architecture, tensors: Any, **changes: Any) -> ExportReport:
    settings: dict[str, Any] = {
        "dtype": torch.float32,
        "tokenizer_dir": None,
        "source_config": None,
        "max_shard_bytes": 1 << 30,
    }
    return export_hf(directory, arch, tensors, **(settings | changes))


@pytest.mark.parametrize(("arch", "hf_class"), [(ODD, "LlamaForCausalLM"), (INDIVISIBLE, "MistralForCausalLM")])
def test_pruned_odd_shape_loads_and_generates_in_stock_transformers(
    tmp_path: Path, arch: Architecture, hf_class: str
) -> None:
    weights = random_weights(arch)
    report = export(tmp_path / "out", arch, weights.__getitem__)
    assert report.hf_class == hf_class
    assert report.shards == ("model.safetensors",)
    assert report.num_bytes == 4 * report.num_parameters == 4 * arch.num_parameters()
    assert verify_export(tmp_path / "out", arch, weights).max_abs_logit_difference <= 1e-4
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = torch.tensor([[5, 6, 7]])
    generated = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert generated.shape == (1, 9)
    ours = CausalLM(arch, logical_shapes(arch), torch_ops())
    ours.load_state_dict(weights)
    tokens = prompt
    for _ in range(6):  # the stock K/V cache and our full recomputation choose the same words
        tokens = torch.cat((tokens, ours(tokens)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biases", [False, True])
def test_uneven_kv_groups_are_expanded_without_loss(tmp_path: Path, dtype: torch.dtype, biases: bool) -> None:
    arch = dataclasses.replace(UNEVEN, qkv_bias=biases, out_bias=biases, mlp_bias=biases)
    weights = random_weights(arch)
    report = export(tmp_path / "out", arch, weights, dtype=dtype)
    assert report.expanded_kv
    assert report.hf_class == ("SeedOssForCausalLM" if biases else "MistralForCausalLM")
    assert verify_export(tmp_path / "out", arch, weights).max_abs_logit_difference <= 1e-4
    stored = load_file(tmp_path / "out" / "model.safetensors")
    keys = stored["model.layers.0.self_attn.k_proj.weight"].unflatten(0, (7, 16))
    logical = weights["model.layers.0.self_attn.k_proj.weight"].to(dtype).unflatten(0, (3, 16))
    for head, kv in enumerate((0, 0, 0, 1, 1, 1, 2)):
        assert torch.equal(keys[head], logical[kv])


def test_views_of_one_flat_buffer_can_be_written(tmp_path: Path) -> None:
    weights = random_weights(ODD)
    flat = torch.cat([tensor.flatten() for tensor in weights.values()])
    views, start = {}, 0
    for name, tensor in weights.items():
        views[name] = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    export(tmp_path / "out", ODD, views)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 2 * flat.nbytes
    assert verify_export(tmp_path / "out", ODD, weights).num_tensors == len(weights)


@pytest.mark.parametrize("shards", [1, 4])
def test_a_single_flipped_bit_fails_the_proof(tmp_path: Path, shards: int) -> None:
    weights = random_weights(ODD)
    limit = 4 * ODD.num_parameters() // shards
    export(tmp_path / "out", ODD, weights, max_shard_bytes=limit)
    name = "model.layers.1.mlp.up_proj.weight"
    file = next(f for f in (tmp_path / "out").glob("*.safetensors") if name in load_file(f))
    tensors = load_file(file)
    tensors[name].view(torch.int32)[3, 4] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(MegatronPruneError, match=f"tensor '{name}' differs"):
        verify_export(tmp_path / "out", ODD, weights)


def test_a_configuration_that_changes_the_maths_fails_the_proof(tmp_path: Path) -> None:
    weights = random_weights(ODD)
    export(tmp_path / "out", ODD, weights)
    config = read_config(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(MegatronPruneError, match="logits of transformers differ"):
        verify_export(tmp_path / "out", ODD, weights)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(MegatronPruneError, match="missing or unexpected"):
        verify_export(tmp_path / "out", ODD, weights)


def test_tokenizer_and_generation_settings_travel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    words = {"<eos>": 0, "hello": 1, "world": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<eos>")
    fast.save_pretrained(source)
    settings = {"eos_token_id": 0, "temperature": 0.5, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(settings))
    (source / "README.md").write_text("not for the export")
    export(tmp_path / "out", ODD, random_weights(ODD), tokenizer_dir=source, source_config={"eos_token_id": 0})
    reloaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert reloaded("hello world")["input_ids"] == [1, 2]
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.temperature) == (0, 0.5)
    assert read_config(tmp_path / "out")["eos_token_id"] == 0
    assert not (tmp_path / "out" / "README.md").exists()
    # An earlier export can be the tokenizer's source of the one that replaces it.
    export(tmp_path / "out", ODD, random_weights(ODD), tokenizer_dir=tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("world")["input_ids"] == [2]


def test_nothing_half_written_and_the_earlier_export_stays(tmp_path: Path) -> None:
    weights = random_weights(ODD)

    def failing(name: str) -> Tensor:
        if name == "model.layers.1.mlp.down_proj.weight":
            raise RuntimeError("out of luck")
        return weights[name]

    with pytest.raises(RuntimeError, match="out of luck"):
        export(tmp_path / "out", ODD, failing, max_shard_bytes=100_000)
    assert list(tmp_path.iterdir()) == []
    export(tmp_path / "out", ODD, weights, max_shard_bytes=100_000)
    before = sorted(file.name for file in (tmp_path / "out").iterdir())
    with pytest.raises(RuntimeError, match="out of luck"):
        export(tmp_path / "out", ODD, failing)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == before
    assert verify_export(tmp_path / "out", ODD, weights).num_tensors == len(weights)
    export(tmp_path / "out", ODD, weights)  # fewer shards: none of the earlier ones is left over
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


class Killed(BaseException):
    """What nobody tidies up after."""


@pytest.mark.parametrize("renames", [0, 1])
def test_the_next_export_clears_what_a_kill_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int) -> None:
    weights, left = random_weights(ODD), [renames]

    def kill(*_: object, **__: object) -> None:
        raise Killed

    def mortal(source: Path, target: Path) -> None:
        left[0] -= 1
        (os.rename if left[0] >= 0 else kill)(source, target)

    def failing(name: str) -> Tensor:
        raise RuntimeError("out of luck")

    export(tmp_path / "out", ODD, weights)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", mortal)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            export(tmp_path / "out", ODD, weights)
    assert (tmp_path / "out").exists() is (renames == 0)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(RuntimeError, match="out of luck"):
        export(tmp_path / "out", ODD, failing)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the earlier one is back where it was"
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_foreign_targets_are_left_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file({"x": torch.ones(1)}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="exists and is no earlier export"):
        export(source, ODD, random_weights(ODD))
    assert has_weights(source)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="exists and is no earlier export"):
        export(file, ODD, random_weights(ODD))
    (tmp_path / "empty").mkdir()
    assert export(tmp_path / "empty", ODD, random_weights(ODD)).shards


def test_shards_hold_the_limit_and_the_model_order() -> None:
    plan = hf_export._plan_shards({"a": 3, "b": 3, "c": 9, "d": 1, "e": 5}, 6)
    assert list(plan.values()) == [["a", "b"], ["c"], ["d", "e"]]
    assert next(iter(plan)) == "model-00001-of-00003.safetensors"
