"""What is collected of a step: once for every input, whatever runs the layers, and as many bytes as a plan says."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from watched_model import ARCH, MICRO_BATCHES, Watched, random_weights

from megatron_prune.config import Config
from megatron_prune.config.yaml_file import with_values
from megatron_prune.memory import stage_memory
from megatron_prune.pruning.statistics import Inputs

TOKENS = torch.randint(ARCH.vocab_size, (4, 9), generator=torch.Generator().manual_seed(1))


def make() -> Watched:
    return Watched(random_weights(torch.Generator().manual_seed(0)))


def recompute(layer: nn.Module) -> None:
    layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def compiled(layer: nn.Module) -> None:
    layer.compile(backend="eager")


@pytest.mark.parametrize("change", [recompute, compiled])
def test_every_input_is_counted_once(change: Callable[[nn.Module], None]) -> None:
    plain, changed = make(), make()
    for layer in changed.model.model.layers:
        change(layer)
    for watched in (plain, changed):
        part = TOKENS.chunk(MICRO_BATCHES)[0][:, :-1]
        watched.model(part)  # before and after, nobody watches; it is now compiled for this shape, without hooks
        watched.backward(TOKENS)
        watched.model(part)
    norms = plain.squares.norms()
    assert len(norms) == 2 * ARCH.num_layers
    for name, norm in changed.squares.norms().items():
        torch.testing.assert_close(norm, norms[name])
    for mine, other in zip(changed.sites, plain.sites, strict=True):
        assert mine.readers == other.readers
        torch.testing.assert_close(changed.product(mine), plain.product(other))


def test_a_step_begins_with_nothing_and_what_it_saw_can_be_freed() -> None:
    watched = make()
    watched.backward(TOKENS)
    first = watched.fisher.fragment("model.layers.0.mlp.down_proj.weight", 5, 10).clone()
    product = watched.product(watched.sites[1])
    watched.backward(TOKENS)
    again = watched.fisher.fragment("model.layers.0.mlp.down_proj.weight", 5, 10)
    torch.testing.assert_close(again, first)
    torch.testing.assert_close(watched.fisher.fragment("model.layers.0.mlp.down_proj.weight", 5, 10), first)
    torch.testing.assert_close(watched.product(watched.sites[1]), product)
    watched.products.clear()
    assert not watched.products._totals


def test_the_planner_counts_the_bytes() -> None:
    watched = make()
    watched.backward(TOKENS)

    def held(inputs: Inputs, axes: tuple[str, ...]) -> int:
        return sum(total.nbytes for site, total in inputs._totals.items() if site.axis in axes)

    def planned(**values: object) -> int:
        (memory,) = stage_memory(ARCH, with_values(Config(), {"target_params": "1K", **values}), 1)
        return memory.statistics

    diagonals = sum(total.nbytes for total in watched.fisher._totals.values())
    assert planned(prune_metric="taylor") == planned(prune_metric="diag-hessian", prune_hessian="adam") == 0
    assert planned(prune_metric="diag-hessian") == planned(prune_metric="taylor-mixed") == diagonals
    assert planned(prune_metric="wanda") == held(watched.squares, ("heads", "ffn"))
    # The products of float64 inputs are float64.
    assert planned(prune_metric="obc") == held(watched.products, ("heads", "ffn")) // 2
    assert planned(second_order=True) == held(watched.products, ("heads", "ffn", "stem")) // 2
    assert planned(second_order=True, prune_axes=("stem",)) == held(watched.products, ("stem",)) // 2
    assert planned(second_order=True, target_params=None) == 0
