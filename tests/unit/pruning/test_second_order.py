"""Optimal brain surgery against the textbook: explicit inverse Hessians, one weight row and one column at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from watched_model import ARCH, Watched, random_weights

from megatron_prune.architecture import Architecture, TensorSpec, tensor_specs, uniform_kv_groups
from megatron_prune.model.sites import InputSite
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.placement import deposit_, place
from megatron_prune.pruning.groups import MiniGroup, remove
from megatron_prune.pruning.saliency import Sums
from megatron_prune.pruning.second_order import (
    AXIS_OF,
    DAMPING,
    block_scores,
    column_scores,
    compensation,
    compensations,
)

TOLERANCE = 1e-5
GROUPS = {
    "attention": MiniGroup("attention", (4, 1)),
    "pair of heads": MiniGroup("attention", ((4, 1), (2, 5))),
    "ffn": MiniGroup("ffn", (35, 0)),
    "stem": MiniGroup("stem", 7),
}


def draw_problem(seed: int, columns: int, tokens: int, rows: int) -> tuple[Tensor, Tensor]:
    """Weights ``[rows, columns]`` and inputs ``[tokens, columns]`` of very different sizes, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (4 * torch.rand(columns, generator=generator, dtype=torch.float64) - 2)
    sizes[torch.rand(columns, generator=generator) < 0.1] = 0
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) * sizes
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x


def damped(x: Tensor) -> Tensor:
    h = x.T @ x
    mean = h.diagonal().mean()
    return h + torch.eye(len(h), dtype=h.dtype) * (DAMPING * mean if mean > 0 else 1.0)


def textbook(weight: Tensor, x: Tensor, lost: list[int]) -> tuple[Tensor, Tensor]:
    """OBS (Hassibi and Stork 1993): each row on its own, column after column, the inverse Hessian cut every time.

    Returns:
        New weights, and what every row lost by it.
    """
    new, costs = weight.clone(), torch.zeros(len(weight), dtype=torch.float64)
    inverse = torch.linalg.inv(damped(x))
    for p in lost:
        for row in range(len(new)):
            costs[row] += new[row, p] ** 2 / inverse[p, p]
            new[row] -= new[row, p] / inverse[p, p] * inverse[:, p]
        inverse = inverse - torch.outer(inverse[:, p], inverse[p]) / inverse[p, p]
        inverse[p, p] = 1.0  # gone: its weight is 0 and takes no part any more
    return new, costs


problems = st.builds(
    draw_problem,
    seed=st.integers(0, 2**31),
    columns=st.sampled_from([2, 4, 6, 12]),
    tokens=st.integers(1, 30),
    rows=st.integers(1, 5),
)


@settings(max_examples=60, deadline=None)
@given(problem=problems, lost=st.lists(st.integers(0, 1), min_size=1, max_size=2, unique=True))
def test_the_update_is_the_textbooks_and_lowers_the_error(problem: tuple[Tensor, Tensor], lost: list[int]) -> None:
    weight, x = problem
    lost = lost if len(lost) < weight.shape[1] else lost[:1]
    updated = weight + weight[:, lost] @ compensation(x.T @ x, torch.tensor(lost))
    expected, _ = textbook(weight, x, lost)
    torch.testing.assert_close(updated, expected, rtol=TOLERANCE, atol=TOLERANCE * float(weight.abs().max()))
    assert not updated[:, lost].any()
    error, plain = ((x @ (w - weight).T).square().sum() for w in (updated, zeroed(weight, lost)))
    assert error <= plain * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(problem=problems)
def test_the_scores_are_the_textbooks(problem: tuple[Tensor, Tensor]) -> None:
    weight, x = problem
    close = partial(torch.testing.assert_close, rtol=TOLERANCE, atol=0)
    inverse = torch.linalg.inv(damped(x))
    elements = weight**2 / inverse.diagonal()
    rows, columns = column_scores(weight, x.T @ x)
    close(rows, elements.sum(1))
    close(columns, elements.sum(0))
    rows, blocks = block_scores(weight, x.T @ x, 2)
    close(rows, elements.sum(1))
    heads = range(weight.shape[1] // 2)
    close(blocks, torch.stack([textbook(weight, x, [2 * i, 2 * i + 1])[1].sum() for i in heads]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_finite_score_nothing_and_change_nothing(value: float) -> None:
    weight, x = draw_problem(0, 4, 9, 3)
    x[2, 1] = value
    assert not torch.isfinite(torch.cat(column_scores(weight, x.T @ x))).any()
    shares = compensation(x.T @ x, torch.tensor([2]))
    assert shares.tolist() == [[0, 0, -1, 0]]


@pytest.mark.parametrize("name", GROUPS)
def test_a_removal_lowers_the_error_of_every_layer_it_touches(name: str) -> None:
    """In a model, one removal after another from the same pass: every matrix that loses input columns, and no other."""
    generator = torch.Generator().manual_seed(3)
    watched = Watched(random_weights(generator))
    inputs: dict[InputSite, Tensor] = {}
    hooks = [site.module.register_forward_pre_hook(keep(inputs, site)) for site in watched.sites]
    watched.backward(torch.randint(ARCH.vocab_size, (4, 9), generator=generator))
    for hook in hooks:
        hook.remove()
    earlier = [MiniGroup("stem", 3), MiniGroup("ffn", (8, 9)), MiniGroup("attention", (0, 0))]
    for group in earlier:
        watched.remove(remove(watched.partition, group))
    group = GROUPS[name]
    before = {n: p.detach().clone() for n, p in watched.model.named_parameters()}
    watched.compensate(group)
    touched = [site for site in watched.sites if site.axis == AXIS_OF[group.type]]
    assert {n for n, p in watched.model.named_parameters() if not torch.equal(p, before[n])} == {
        reader for site in touched for reader in site.readers
    }
    width = ARCH.head_dim if group.type == "attention" else 1
    for site in touched:
        lost = [unit * width + i for unit in group.indices(site.layer or 0) for i in range(width)]
        dead = watched.partition.elements(site.axis, site.layer) < 0
        x = inputs[site].clone()
        x[:, dead] = 0
        for reader in site.readers:
            weight, new = before[reader], watched.model.get_parameter(reader).detach()
            alive = torch.from_numpy(~dead)
            positions = [int(alive[:i].sum()) for i in lost]
            expected, _ = textbook(weight[:, alive], x[:, alive], positions)
            torch.testing.assert_close(new[:, alive], expected, rtol=TOLERANCE, atol=TOLERANCE)
            assert not new[:, dead].any()
            error, plain = ((x @ (w - weight).T).square().sum() for w in (new, zeroed(weight, lost)))
            assert error < plain


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    ("group", "name", "axes"),
    [
        (MiniGroup("attention", (4,)), "self_attn.o_proj.weight", ("stem", "heads")),
        (MiniGroup("ffn", (9,)), "mlp.down_proj.weight", ("stem", "ffn")),
        (MiniGroup("stem", 4), "mlp.up_proj.weight", ("ffn", "stem")),
    ],
    ids=["attention", "ffn", "stem"],
)
def test_fragments_on_any_ranks_are_updated_like_the_logical_matrix(
    ranks: int, group: MiniGroup, name: str, axes: tuple[str, str]
) -> None:
    arch = Architecture("llama", 1, 7, 11, 5, uniform_kv_groups(1, 5, 5), 2, 9)
    partition = Partition.of(arch, ranks)
    for earlier in (MiniGroup("attention", (1,)), MiniGroup("ffn", (3,)), MiniGroup("stem", 2)):
        partition = remove(partition, earlier)
    spec = TensorSpec(f"model.layers.0.{name}", axes, 0)  # type: ignore[arg-type]
    assert spec in tensor_specs(arch)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(partition.logical_shape(spec), generator=generator, dtype=torch.float64)
    x = torch.randn(30, weight.shape[1], generator=generator, dtype=torch.float64)
    site = InputSite(axes[1], 0, torch.nn.Identity(), (spec.name,))  # type: ignore[arg-type]
    (update,) = compensations(group, [site], partition, Sums(), lambda site: x.T @ x)
    pieces = {}
    for rank in range(ranks):
        flat = place(weight, spec, partition, rank).flatten()
        third = len(flat) // 3 + 1
        pieces[rank] = [(start, flat[start : start + third].clone()) for start in range(0, len(flat), third)]
    rows, columns = partition.shape(spec)
    lost = torch.zeros(ranks, rows, len(update.lost), dtype=torch.float64)
    for rank, fragments in pieces.items():
        for start, fragment in fragments:
            held = update.lost_of(fragment, start, partition, rank)
            lost[rank, start // columns : start // columns + len(held)] += held
    if axes[0] == "stem":  # row parallel: the columns lie on one rank, all need them
        lost[:] = lost.sum(0)
    found = torch.zeros_like(weight)
    for rank, fragments in pieces.items():
        for start, fragment in fragments:
            update.apply_(fragment, start, lost[rank], partition, rank)
            deposit_(found, fragment, spec, partition, rank, start)
    expected, _ = textbook(weight, x, update.lost.tolist())
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def zeroed(weight: Tensor, columns: list[int]) -> Tensor:
    plain = weight.clone()
    plain[:, columns] = 0
    return plain


def keep(inputs: dict[InputSite, Tensor], site: InputSite) -> Callable[..., None]:
    """Hook that joins what a site is given to what it was given before."""

    def add(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach().flatten(0, -2)
        inputs[site] = torch.cat([inputs[site], x]) if site in inputs else x

    return add
