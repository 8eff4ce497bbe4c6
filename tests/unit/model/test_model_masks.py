"""Masks of 0 and 1 make the model in which the units at 0 do not exist; in between they have gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_prune.architecture import Architecture, TensorSpec, tensor_specs, uniform_kv_groups
from megatron_prune.model import CausalLM, logical_shapes
from megatron_prune.model.masks import ModelMasks, UnitMask
from megatron_prune.ops.dispatch import torch_ops
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.placement import deposit_, place
from megatron_prune.pruning.groups import MiniGroup, remove

ARCH = Architecture("qwen3", 2, 20, 26, 6, uniform_kv_groups(2, 6, 3), 8, 50, qk_norm=True, tie_embeddings=True)
TOKENS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(3))
#: Indices per layer; the stem has one for both. Layer 0 loses the second K/V head.
HEADS, FFN, STEM = ((2, 1), (3, 5)), ((0, 25), (7, 3), (9, 9)), (4, 19, 0)
GROUPS = [
    *(MiniGroup("attention", units) for units in HEADS),
    *(MiniGroup("ffn", units) for units in FFN),
    *(MiniGroup("stem", unit) for unit in STEM),
]
CPU = torch.device("cpu")


def extract(physical: Tensor, spec: TensorSpec, partition: Partition) -> Tensor:
    """Inverse of :func:`place`."""
    logical = physical.new_zeros(partition.logical_shape(spec))
    deposit_(logical, physical.reshape(-1), spec, partition, 0, 0)
    return logical


@pytest.fixture
def model() -> CausalLM:
    model = CausalLM(ARCH, logical_shapes(ARCH), torch_ops()).double()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.3 if parameter.dim() == 1 else 0.0, 0.3, generator=generator)
    return model


def masks_without(gone: list[Any], units: int) -> tuple[UnitMask, ...]:
    """Masks of every layer that are 0 where a unit is in ``gone`` and 1 elsewhere."""
    made = []
    for layer in gone:
        mask, values = UnitMask(units, CPU), torch.ones(units)
        values[list(layer)] = 0
        mask.set(values, values)
        made.append(mask)
    return tuple(made)


def all_masks() -> ModelMasks:
    by_layer = [list(zip(*axis, strict=True)) for axis in (HEADS, FFN)]
    (stem,) = masks_without([STEM], ARCH.hidden_size)
    return ModelMasks(masks_without(by_layer[0], 6), masks_without(by_layer[1], 26), stem)


def sliced(model: CausalLM) -> CausalLM:
    full = partition = Partition.of(ARCH)
    for group in GROUPS:
        partition = remove(partition, group)
    arch, small = partition.architecture(), partition.compacted(1)
    found = CausalLM(arch, logical_shapes(arch), torch_ops()).double()

    def moved(spec: TensorSpec) -> Tensor:
        return place(extract(place(model.get_parameter(spec.name).detach(), spec, full), spec, partition), spec, small)

    for spec in tensor_specs(ARCH):
        *path, attribute = spec.name.split(".")
        setattr(found.get_submodule(".".join(path)), attribute, nn.Parameter(moved(spec)))
    return found


@pytest.mark.parametrize("training", [True, False])
def test_masked_is_sliced(model: CausalLM, training: bool) -> None:
    expected = sliced(model)(TOKENS)
    model.train(training).set_masks(all_masks())
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-10, atol=1e-10)


def test_each_axis_matters_and_none_leaves_the_model_as_it_is(model: CausalLM) -> None:
    plain, masks = model(TOKENS), all_masks()
    for axis in ("heads", "ffn", "stem"):
        model.set_masks(dataclasses.replace(ModelMasks(), **{axis: getattr(masks, axis)}))
        assert (model(TOKENS) - plain).abs().max() > 1e-2, axis
    model.set_masks(ModelMasks())
    assert torch.equal(model(TOKENS), plain)


def test_training_draws_and_evaluation_settles(model: CausalLM) -> None:
    mask = UnitMask(20, CPU)
    half = torch.full((20,), 0.5)
    mask.set(half, torch.ones(20))
    plain = model.eval()(TOKENS)
    model.set_masks(ModelMasks(stem=mask))
    torch.testing.assert_close(model.eval()(TOKENS), plain)
    model.train()(TOKENS).square().mean().backward()
    assert mask.drawn.grad is not None
    assert mask.drawn.grad.abs().min() > 0
    mask.set(half, half)
    assert mask.drawn.grad is None
