"""Reading a source: where it may be, and every way it can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from megatron_prune.architecture import Architecture, tensor_specs
from megatron_prune.checkpoint import hf_source
from megatron_prune.checkpoint.hf import SourceWeights, has_weights, read_architecture, resolve_source
from megatron_prune.errors import UserError
from megatron_prune.model import initial_tensor

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "tie_word_embeddings": True,
}
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"


def weights_of(arch: Architecture) -> dict[str, Tensor]:
    return {s.name: initial_tensor(s.name, arch.tensor_shape(s), 3, arch.num_layers) for s in tensor_specs(arch)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model directory with one weight file."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights_of(read_architecture(tmp_path)), tmp_path / "model.safetensors")
    return tmp_path


def rewrite(source: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = weights_of(read_architecture(source))
    edit(tensors)
    save_file(tensors, source / "model.safetensors")


def shard(source: Path) -> None:
    tensors = weights_of(read_architecture(source))
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, source / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (source / "model.safetensors").unlink()


def edit_index(source: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((source / INDEX).read_text())
    edit(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))


def refused(source: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        SourceWeights(source, read_architecture(source))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_come_back_as_stored(source: Path, dtype: torch.dtype, sharded: bool) -> None:
    rewrite(source, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    arch = read_architecture(source)
    expected = {name: tensor.to(dtype) for name, tensor in weights_of(arch).items()}
    if sharded:
        shard(source)
        for file in source.glob("?.safetensors"):
            part = {n: expected[n] for n in hf_source._stored_names(file)}
            save_file(part, file)
    weights = SourceWeights(source, arch)
    assert weights.names() == tuple(spec.name for spec in tensor_specs(arch))
    for name in weights.names():
        assert weights.tensor(name).dtype == dtype
        assert torch.equal(weights.tensor(name), expected[name])


def test_old_rotary_buffers_and_an_equal_tied_head_are_tolerated(source: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()

    rewrite(source, edit)
    assert "lm_head.weight" not in SourceWeights(source, read_architecture(source)).names()


def test_a_different_tied_head_is_refused(source: Path) -> None:
    rewrite(source, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING] + 1}))
    refused(source, "the stored lm_head.weight differs")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(GATE), f"lacks the tensor '{GATE}'"),
        (lambda t: t.update({"model.vision.weight": torch.ones(2)}), "unknown tensor.*'model.vision.weight'"),
        (lambda t: t.update({GATE.replace("weight", "bias"): torch.ones(12)}), "unknown tensor.*gate_proj.bias"),
        (lambda t: t.update({GATE: torch.ones(12, 15)}), r"shape \(12, 15\), config.json says \(12, 16\)"),
        (lambda t: t.update({GATE: torch.ones(12, 16).to(torch.int8)}), "stored as I8"),
    ],
)
def test_wrong_tensors_are_named(source: Path, edit: Callable[[dict[str, Tensor]], object], message: str) -> None:
    rewrite(source, edit)
    refused(source, message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update({GATE: "../a.safetensors"}), "names the shard '../a.safetensors'"),
        (lambda m: m.update({GATE: "/etc/passwd"}), "names the shard '/etc/passwd'"),
        (lambda m: m.update({GATE: "a.bin"}), "names the shard 'a.bin'"),
        (lambda m: m.update({GATE: 3}), "names the shard 3"),
        (lambda m: m.update({GATE: "c.safetensors"}), "shard .*c.safetensors is missing"),
        (lambda m: m.update({EMBEDDING: "b.safetensors"}), f"says tensor '{EMBEDDING}' is in b.safetensors"),
        (lambda m: m.clear(), "has no weight_map"),
    ],
)
def test_wrong_indexes_are_refused(source: Path, edit: Callable[[dict[str, str]], object], message: str) -> None:
    shard(source)
    edit_index(source, edit)
    refused(source, message)


def test_a_tensor_in_two_shards_is_refused(source: Path) -> None:
    shard(source)
    arch = read_architecture(source)
    save_file(weights_of(arch), source / "b.safetensors")
    refused(source, "is in both a.safetensors and b.safetensors")


def test_truncated_weights_are_refused(source: Path) -> None:
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(source, "no readable safetensors file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"])
def test_pickles_are_refused_and_not_taken_for_no_weights(source: Path, name: str) -> None:
    (source / "model.safetensors").unlink()
    assert not has_weights(source)
    (source / name).write_bytes(b"{}")
    assert has_weights(source)
    refused(source, f"{name} is a pickle.*convert the source to safetensors")


def test_no_weights_at_all(source: Path) -> None:
    (source / "model.safetensors").unlink()
    refused(source, "has neither model.safetensors nor")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no config.json"), ("{", "cannot be read as JSON"), ("[]", "holds a list, not an object")],
)
def test_unreadable_configuration(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_architecture(tmp_path)


def test_a_config_file_alone_is_a_source(source: Path) -> None:
    path = resolve_source(str(source / "config.json"))
    assert read_architecture(path) == read_architecture(resolve_source(str(source)))
    assert not has_weights(path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/directory", "a/b/c", "~/nowhere-at-all"])
def test_a_path_that_is_not_there_is_called_a_path(name: str) -> None:
    with pytest.raises(UserError, match="looks like a path"):
        resolve_source(name)


def test_a_weight_file_is_no_source(source: Path) -> None:
    with pytest.raises(UserError, match="is a file; give the model's directory"):
        resolve_source(str(source / "model.safetensors"))


def test_an_unreachable_hub_id_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no connection\nand a long story")

    monkeypatch.setattr(hf_source.huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"as a hub id it cannot be fetched \(no connection\)") as caught:
        resolve_source("some-org/some-model")
    assert "\n" not in str(caught.value)


def test_a_hub_repository_of_pickles_does_not_start_at_random(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_source.huggingface_hub, "snapshot_download", lambda *_, **__: str(source))
    assert resolve_source("some-org/some-model") == source
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no safetensors weights"):
        resolve_source("some-org/some-model")
