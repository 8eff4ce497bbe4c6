"""The decoder's names, its random start, irregular K/V groups, and dead padding that must change nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_prune.architecture import Architecture, tensor_specs, uniform_kv_groups
from megatron_prune.model import (
    DEAD_HEAD,
    CausalLM,
    DecoderLayer,
    LayerShape,
    init_weights,
    initial_tensor,
    logical_shapes,
)
from megatron_prune.ops.dispatch import torch_ops
from megatron_prune.parallel.layers import TensorParallel

TOKENS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(3))


def small(**changes: Any) -> Architecture:
    base = Architecture("llama", 2, 20, 26, 6, uniform_kv_groups(2, 6, 2), 8, 50)
    return dataclasses.replace(base, **changes)


def randomised(arch: Architecture) -> CausalLM:
    model = CausalLM(arch, logical_shapes(arch), torch_ops())
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.3 if parameter.dim() == 1 else 0.0, 0.3, generator=generator)
    return model


ALL_BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied-norms": {"tie_embeddings": True, "qk_norm": True},
    "biases": ALL_BIASES,
    "irregular": {"kv_groups": ((4, 1, 1), (3, 3)), **ALL_BIASES},
    "mha-window": {"kv_groups": uniform_kv_groups(2, 6, 6), "sliding_window": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_is_the_axis_table(variant: str) -> None:
    arch = small(**VARIANTS[variant])
    state = CausalLM(arch, logical_shapes(arch), torch_ops()).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        spec.name: arch.tensor_shape(spec) for spec in tensor_specs(arch)
    }


def place(tensor: Tensor, axes: tuple[str, ...], indices: dict[str, Tensor], sizes: dict[str, int]) -> Tensor:
    """Scatter a logical tensor into zeros at the physical index of every live row and column."""
    for dim, axis in enumerate(axes):
        if axis in indices:
            shape = list(tensor.shape)
            shape[dim] = sizes[axis]
            tensor = torch.zeros(shape).index_copy(dim, indices[axis], tensor)
    return tensor


def channels(slots: list[int], head_dim: int) -> Tensor:
    return torch.cat([torch.arange(slot * head_dim, (slot + 1) * head_dim) for slot in slots])


def padded_twin(arch: Architecture, model: CausalLM) -> CausalLM:
    """The same model with dead stem channels, FFN channels, query heads and K/V heads in between and at the end."""
    stem, ffn = list(range(1, 8)) + list(range(9, 22)), list(range(0, 10)) + list(range(13, 29))
    head_slots = [0, 1, 3, 4, 5, 7]
    hidden, ffn_width, heads = 24, 30, 9
    shapes, state = [], {}
    kv_slots = [list(range(1, arch.num_kv_heads(layer) + 1)) for layer in range(arch.num_layers)]
    for layer in range(arch.num_layers):
        kv_of_head = [DEAD_HEAD] * heads
        for slot, kv in zip(head_slots, arch.kv_of_head(layer), strict=True):
            kv_of_head[slot] = kv_slots[layer][kv]
        kv_heads = arch.num_kv_heads(layer) + 2
        shapes.append(LayerShape(hidden, arch.hidden_size, ffn_width, heads, kv_heads, tuple(kv_of_head)))
    for spec in tensor_specs(arch):
        indices = {"stem": torch.tensor(stem), "ffn": torch.tensor(ffn), "heads": channels(head_slots, arch.head_dim)}
        sizes = {"stem": hidden, "ffn": ffn_width, "heads": heads * arch.head_dim}
        if spec.layer is not None:
            indices["kv_heads"] = channels(kv_slots[spec.layer], arch.head_dim)
            sizes["kv_heads"] = shapes[spec.layer].kv_heads * arch.head_dim
        state[spec.name] = place(model.state_dict()[spec.name], spec.axes, indices, sizes)
    twin = CausalLM(arch, shapes, torch_ops())
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("variant", VARIANTS)
def test_dead_padding_changes_no_logit_and_gets_no_gradient(variant: str) -> None:
    arch = small(**VARIANTS[variant])
    model = randomised(arch)
    twin = padded_twin(arch, model)
    logits, twin_logits = model(TOKENS), twin(TOKENS)
    assert logits.std() > 0.1
    torch.testing.assert_close(twin_logits, logits, rtol=1e-6, atol=1e-6 * logits.abs().max().item())
    for each in (logits, twin_logits):
        nn.functional.cross_entropy(each.flatten(0, 1), TOKENS.flatten()).backward()
    gradient, twin_gradient = 0.0, 0.0
    for parameter, twin_parameter in zip(model.parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None
        assert twin_parameter.grad is not None
        gradient += parameter.grad.square().sum().item()
        twin_gradient += twin_parameter.grad.square().sum().item()
        assert (twin_parameter.grad[twin_parameter == 0] == 0).all()
    assert twin_gradient == pytest.approx(gradient, rel=1e-5)


def test_dead_query_of_a_living_kv_head_would_revive_without_its_mark() -> None:
    arch = small()
    layer = DecoderLayer(arch, logical_shapes(arch)[0], torch_ops(), TensorParallel())
    init_weights(layer, arch, 0)
    with torch.no_grad():
        layer.self_attn.q_proj.weight[:8] = 0
        layer.self_attn.o_proj.weight[:, :8] = 0
    x = torch.randn(1, 5, 20, generator=torch.Generator().manual_seed(0))

    def dead_columns() -> float:
        layer.zero_grad()
        layer(x).square().sum().backward()
        grad = layer.self_attn.o_proj.weight.grad
        assert grad is not None
        return grad[:, :8].abs().max().item()

    assert dead_columns() > 0
    layer.set_shape(dataclasses.replace(layer.shape, kv_of_head=(DEAD_HEAD, 0, 0, 1, 1, 1)))
    assert layer.shape.grouped  # the stock GQA kernel still serves it
    assert dead_columns() == 0


def test_irregular_groups_equal_the_expanded_model() -> None:
    arch = small(kv_groups=((4, 1, 1), (2, 4)))
    model = randomised(arch)
    wide = small(kv_groups=uniform_kv_groups(2, 6, 6))
    state = model.state_dict()
    for spec in tensor_specs(arch):
        if "kv_heads" in spec.axes:
            assert spec.layer is not None
            state[spec.name] = state[spec.name][channels(list(arch.kv_of_head(spec.layer)), 8)]
    expanded = CausalLM(wide, logical_shapes(wide), torch_ops())
    expanded.load_state_dict(state)
    torch.testing.assert_close(model(TOKENS), expanded(TOKENS), rtol=0.0, atol=2e-6)


def test_set_shapes_follows_replaced_parameters() -> None:
    arch, narrow = small(), small(hidden_size=14, ffn_hidden_size=9, num_attention_heads=2, kv_groups=((1, 1),) * 2)
    model, target = randomised(arch), randomised(narrow)
    model(TOKENS)
    for name, tensor in target.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.clone()))
    model.set_shapes(logical_shapes(narrow))
    assert torch.equal(model(TOKENS), target(TOKENS))


def test_initial_weights_depend_on_name_and_seed_only() -> None:
    arch = small(**ALL_BIASES)
    model = CausalLM(arch, logical_shapes(arch), torch_ops())
    init_weights(model, arch, seed=7)
    layer = DecoderLayer(arch, logical_shapes(arch)[1], torch_ops(), TensorParallel())
    init_weights(layer, arch, seed=7, prefix="model.layers.1.")
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, model.state_dict()["model.layers.1." + name]), name
    state = model.state_dict()
    assert (state["model.norm.weight"] == 1).all()
    assert (state["model.layers.0.self_attn.q_proj.bias"] == 0).all()
    first, second = state["model.layers.0.mlp.up_proj.weight"], state["model.layers.1.mlp.up_proj.weight"]
    assert not torch.equal(first, second)
    assert not torch.equal(first, initial_tensor("model.layers.0.mlp.up_proj.weight", first.shape, 8, 2))


@pytest.mark.parametrize(("name", "std"), [("x.mlp.up_proj.weight", 0.02), ("x.mlp.down_proj.weight", 0.005)])
def test_initial_spread(name: str, std: float) -> None:
    tensor = initial_tensor(name, (300, 300), seed=1, num_layers=8)
    assert tensor.dtype == torch.float32
    assert tensor.std().item() == pytest.approx(std, rel=0.02)
    assert abs(tensor.mean().item()) < std / 50


def test_shape_rejects_a_map_of_another_length() -> None:
    with pytest.raises(AssertionError):
        LayerShape(hidden=8, live_hidden=8, ffn=8, heads=3, kv_heads=1, kv_of_head=(0, 0))
