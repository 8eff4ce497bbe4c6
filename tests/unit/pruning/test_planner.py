"""The choice between three candidates: norms, ties, floors, targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.parallel.partition import Partition
from megatron_prune.pruning.groups import MiniGroup, remove
from megatron_prune.pruning.planner import Budget, choose, group_sizes, strike_out
from megatron_prune.pruning.saliency import SaliencyVectors, mask_removed, random_vectors

ARCH = Architecture(
    family="llama",
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=4,
    kv_groups=uniform_kv_groups(2, 4, 4),
    head_dim=4,
    vocab_size=10,
    tie_embeddings=True,
)
FLOORS: Any = {"attention": 1, "ffn": 1, "stem": 1}


def vectors(attention: float, ffn: float, stem: float) -> SaliencyVectors:
    """Equal scores within a type, given as mean per element."""
    sizes = {kind: size / 2 for kind, size in group_sizes(ARCH).items()}  # of a layer
    return SaliencyVectors(
        heads=np.full((2, 4), float(attention * sizes["attention"])),
        ffn=np.full((2, 12), float(ffn * sizes["ffn"])),
        stem=np.full(8, 2 * float(stem * sizes["stem"])),
    )


def chosen(scores: SaliencyVectors, norm: Any = "mean", budget: Budget | None = None) -> str | None:
    decision = choose(scores, Partition.of(ARCH), budget or Budget(1, None, FLOORS), norm)
    return None if decision is None else decision.group.type


def test_means_are_compared_and_ties_go_to_attention_then_ffn_then_stem() -> None:
    assert chosen(vectors(1, 1, 1)) == "attention"
    assert chosen(vectors(2, 1, 1)) == "ffn"
    assert chosen(vectors(2, 2, 1)) == "stem"


def test_plain_sums_favour_small_groups() -> None:
    assert chosen(vectors(1, 1, 1), "sum") == "ffn"
    decision = choose(vectors(1, 1, 1), Partition.of(ARCH), Budget(1, None, FLOORS), "sum")
    assert decision is not None
    # Scored elements over both layers: a head 2 * 8 * 4, a channel 2 * 8, a stem channel 2 * (4 * 4 + 12).
    assert decision.scores == {"attention": 64.0, "ffn": 16.0, "stem": 56.0}


def test_params_norm_divides_by_what_is_removed() -> None:
    decision = choose(vectors(1, 1, 1), Partition.of(ARCH), Budget(1, None, FLOORS), "params")
    assert decision is not None
    source = ARCH.num_parameters()
    head_cost = source - remove(Partition.of(ARCH), MiniGroup("attention", (0, 0))).architecture().num_parameters()
    assert decision.scores["attention"] == pytest.approx(2 * 32 / head_cost)
    # Both are a share of the same kind of matrices, so equal scores per weight come out within a small factor.
    assert max(decision.scores.values()) < 3 * min(decision.scores.values())


def test_each_layer_gives_its_own_index_and_ties_go_to_the_lowest() -> None:
    scores = vectors(1, 0.1, 1)
    scores.ffn[0, 7] = scores.ffn[0, 3] = 0.01
    decision = choose(scores, Partition.of(ARCH), Budget(1, None, FLOORS), "mean")
    assert decision is not None
    assert decision.group.removed == (3, 0)


def test_floors_and_axes_exclude() -> None:
    floors: Any = {"attention": 4, "ffn": 1, "stem": 1}
    assert chosen(vectors(0, 1, 2), budget=Budget(1, None, floors)) == "ffn"
    assert chosen(vectors(0, 1, 2), budget=Budget(1, None, FLOORS, axes=["stem"])) == "stem"
    everything: Any = {"attention": 4, "ffn": 12, "stem": 8}
    assert chosen(vectors(0, 1, 2), budget=Budget(1, None, everything)) is None


def test_target_shape_stops_each_axis_at_its_width() -> None:
    budget = Budget(None, {"attention": 4, "ffn": 11, "stem": 8}, FLOORS)
    partition, taken = Partition.of(ARCH), []
    scores = vectors(0, 1, 0)
    while not budget.met(partition.architecture()):
        decision = choose(scores, partition, budget, "mean")
        assert decision is not None
        taken.append(decision.group.type)
        partition, scores = decision.partition, strike_out(scores, decision.group)
    assert taken == ["ffn"]


def test_struck_out_groups_are_not_chosen_again() -> None:
    scores, partition, seen = vectors(9, 9, 1), Partition.of(ARCH), set()
    for _ in range(7):
        decision = choose(scores, partition, Budget(1, None, FLOORS), "mean")
        assert decision is not None
        seen.add(decision.group.removed)
        partition, scores = decision.partition, strike_out(scores, decision.group)
    assert len(seen) == 7


def test_random_scores_depend_on_seed_and_step_only() -> None:
    partition = remove(Partition.of(ARCH), MiniGroup("stem", 2))
    first, again, later = (random_vectors(partition, 1, step) for step in (5, 5, 6))
    np.testing.assert_array_equal(first.stem, again.stem)
    assert not np.array_equal(first.stem, later.stem)
    assert np.isinf(first.stem[2])


def test_removed_units_are_out_of_reach() -> None:
    partition = remove(Partition.of(ARCH), MiniGroup("ffn", (1, 5)))
    masked = mask_removed(vectors(1, 1, 1), partition)
    assert np.argwhere(np.isinf(masked.ffn)).tolist() == [[0, 1], [1, 5]]
