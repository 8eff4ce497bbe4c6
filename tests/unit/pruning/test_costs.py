"""Costs, budgets in each of them, and shapes that end aligned."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.parallel.partition import Partition
from megatron_prune.pruning.cost import Costs, LatencyTable, knots_between
from megatron_prune.pruning.groups import GROUP_TYPES, GroupType
from megatron_prune.pruning.planner import Budget, Decision, choose, group_sizes
from megatron_prune.pruning.saliency import SaliencyVectors, mask_removed

ARCH = Architecture(
    family="llama",
    num_layers=2,
    hidden_size=40,
    ffn_hidden_size=64,
    num_attention_heads=8,
    kv_groups=uniform_kv_groups(2, 8, 8),
    head_dim=4,
    vocab_size=10,
    tie_embeddings=True,
)
FLOORS: Any = {"attention": 1, "ffn": 1, "stem": 1}


def milliseconds(hidden: float, ffn: float, heads: float) -> float:
    return 1 + 0.01 * hidden * ffn + 0.02 * hidden * heads * 4 + 0.1 * ffn


def table(points: int = 3) -> LatencyTable:
    hidden, ffn, heads = knots_between(1, 40, points), knots_between(1, 64, points), knots_between(1, 8, points)
    times = np.array([[[milliseconds(d, f, h) for h in heads] for f in ffn] for d in hidden])
    return LatencyTable.of((hidden, ffn, heads), times, {})


def flat(partition: Partition) -> SaliencyVectors:
    """The same mean per element everywhere."""
    arch = partition.architecture()
    sizes = group_sizes(arch)
    vectors = SaliencyVectors(
        heads=np.full((2, 8), sizes["attention"] / 2),
        ffn=np.full((2, 64), sizes["ffn"] / 2),
        stem=np.full(40, float(sizes["stem"])),
    )
    return mask_removed(vectors, partition)


def descend(budget: Budget, norm: Any = "mean", seed: int = 0) -> list[Decision]:
    """Decisions until a budget is met, with random scores around equal means."""
    partition, decisions, draw = Partition.of(ARCH), [], np.random.default_rng(seed)
    while not budget.met(partition.architecture()):
        vectors = flat(partition)
        heads, ffn, stem = (x * draw.uniform(0.5, 2, x.shape) for x in (vectors.heads, vectors.ffn, vectors.stem))
        noisy = SaliencyVectors(heads, ffn, stem)
        decision = choose(noisy, partition, budget, norm)
        assert decision is not None, partition.architecture()
        decisions.append(decision)
        partition = decision.partition
    return decisions


def last(decisions: list[Decision]) -> Architecture:
    return decisions[-1].partition.architecture()


def test_norms_are_sums_per_unit_of_cost_freed() -> None:
    partition = Partition.of(ARCH)
    costs = Costs(seq_length=16, latency=table())
    sums: dict[GroupType, float] = {kind: float(size) for kind, size in group_sizes(ARCH).items()}
    narrower: dict[GroupType, Architecture] = {
        "attention": dataclasses.replace(ARCH, num_attention_heads=7, kv_groups=uniform_kv_groups(2, 7, 7)),
        "ffn": dataclasses.replace(ARCH, ffn_hidden_size=63),
        "stem": dataclasses.replace(ARCH, hidden_size=39),
    }
    functions: dict[str, Any] = {
        "params": lambda arch: arch.num_parameters(),
        "flops": lambda arch: arch.flops_per_token(16),
        "latency": lambda arch: milliseconds(arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads),
    }
    for norm, cost in functions.items():
        decision = choose(flat(partition), partition, Budget(1, None, FLOORS, costs=costs), norm)  # type: ignore[arg-type]
        assert decision is not None
        expected = {kind: sums[kind] / (cost(ARCH) - cost(narrower[kind])) for kind in GROUP_TYPES}
        assert decision.scores == pytest.approx(expected)
        assert decision.group.type == min(expected, key=lambda kind: expected[kind])


def test_flops_and_parameters_disagree_about_attention() -> None:
    """A head's products with the context are FLOPs without parameters."""
    partition = Partition.of(ARCH)
    scores = {}
    for length in (1, 4096):
        budget = Budget(1, None, FLOORS, costs=Costs(seq_length=length))
        decision = choose(flat(partition), partition, budget, "flops")
        assert decision is not None
        scores[length] = decision.scores
    assert scores[4096]["attention"] < 0.2 * scores[1]["attention"]
    assert scores[4096]["ffn"] == scores[1]["ffn"]


def test_only_heads_free_cache_and_then_means_decide() -> None:
    partition = Partition.of(ARCH)
    vectors = flat(partition)
    vectors.heads[:] *= 1000
    decision = choose(vectors, partition, Budget(1, None, FLOORS), "kv-bytes")
    assert decision is not None
    assert decision.group.type == "attention"
    assert set(decision.scores) == {"attention"}
    without: Any = ["ffn", "stem"]
    decision = choose(vectors, partition, Budget(1, None, FLOORS, axes=without), "kv-bytes")
    assert decision is not None
    assert decision.group.type == "ffn"


def test_a_query_is_credited_its_share_of_the_cache() -> None:
    grouped = dataclasses.replace(ARCH, kv_groups=uniform_kv_groups(2, 8, 4))
    fewer = dataclasses.replace(grouped, num_attention_heads=4, kv_groups=uniform_kv_groups(2, 4, 4))
    assert grouped.kv_bytes_per_token() == fewer.kv_bytes_per_token() == 2 * 2 * 4 * 4 * 2
    assert Costs().freed("kv-bytes", grouped, fewer) == grouped.kv_bytes_per_token() / 2
    last_ones = dataclasses.replace(grouped, num_attention_heads=3, kv_groups=uniform_kv_groups(2, 3, 3))
    assert Costs().freed("kv-bytes", fewer, last_ones) == fewer.kv_bytes_per_token() / 4


def test_interpolation_is_exact_for_products_of_widths() -> None:
    times = table()
    for shape in ((40, 64, 8), (1, 1, 1), (17, 33, 5), (39, 2, 7)):
        assert times.milliseconds_of(*shape) == pytest.approx(milliseconds(*shape))
    again = LatencyTable.from_dict(json.loads(json.dumps(times.to_dict())))
    assert again.milliseconds_of(17, 33, 5) == times.milliseconds_of(17, 33, 5)


def test_an_axis_that_stays_has_one_knot() -> None:
    times = LatencyTable.of(((40,), (8, 64), (8,)), np.array([[[2.0], [4.0]]]), {})
    assert times.milliseconds_of(40, 36, 8) == 3.0


def test_a_wider_shape_is_never_faster() -> None:
    noisy = np.random.default_rng(0).uniform(0.5, 1.5, (3, 3, 3)) * np.arange(1, 4)[:, None, None]
    times = LatencyTable.of(((1, 20, 40), (1, 32, 64), (1, 4, 8)), noisy, {})
    for shape in np.random.default_rng(1).integers((1, 1, 1), (40, 64, 8), (50, 3)).tolist():
        for axis in range(3):
            wider = [width + (axis == place) for place, width in enumerate(shape)]
            assert times.milliseconds_of(*wider) >= times.milliseconds_of(*shape)


@pytest.mark.parametrize(
    "damage", [{"milliseconds": [1.0]}, {"heads": None}, {"milliseconds": [[[float("nan")] * 3] * 3] * 3}]
)
def test_a_damaged_table_is_noticed(damage: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        LatencyTable.from_dict(table().to_dict() | damage)


def test_a_latency_budget_ends_at_the_first_shape_within_it() -> None:
    costs = Costs(latency=table())
    budget = Budget(None, None, FLOORS, limit=("latency", 20.0), costs=costs)
    decisions = descend(budget, "latency")
    before, after = (costs.of("latency", d.partition.architecture()) for d in decisions[-2:])
    assert after <= 20.0 < before
    # The last step is not a head where a channel would have done.
    assert 20.0 - after <= costs.freed("latency", last(decisions[:-1]), last(decisions))


def test_channels_are_not_used_up_for_what_only_heads_can_save() -> None:
    times = np.array([[[0.01 * d / 40 + 0.01 * f / 64 + h for h in (1, 8)] for f in (1, 64)] for d in (1, 40)])
    costs = Costs(latency=LatencyTable.of(((1, 40), (1, 64), (1, 8)), times, {}))
    end = last(descend(Budget(None, None, FLOORS, limit=("latency", 2.5), costs=costs), "latency"))
    assert (end.hidden_size, end.ffn_hidden_size, end.num_attention_heads) == (40, 64, 2)


def test_a_cache_budget_takes_heads_alone() -> None:
    half = ARCH.kv_bytes_per_token() // 2
    axes: Any = ["attention"]
    decisions = descend(Budget(None, None, FLOORS, axes, limit=("kv-bytes", half)))
    assert [decision.group.type for decision in decisions] == ["attention"] * 4
    assert last(decisions).kv_bytes_per_token() == half


def test_what_is_dear_goes_sooner_when_its_cost_counts() -> None:
    """At equal saliency the shape found depends on the currency."""
    dear_heads = Costs(latency=LatencyTable.of(((1, 40), (1, 64), (1, 8)), _dear_heads(), {}))
    by_time = last(descend(Budget(18000, None, FLOORS, costs=dear_heads), "latency"))
    by_size = last(descend(Budget(18000, None, FLOORS), "params"))
    assert by_time.num_attention_heads < by_size.num_attention_heads
    assert abs(by_time.num_parameters() - by_size.num_parameters()) < 200


def _dear_heads() -> Any:
    return np.array([[[d + f + 50 * h for h in (1, 8)] for f in (1, 64)] for d in (1, 40)], dtype=np.float64)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("align", [8, 16])
def test_the_search_ends_at_multiples_and_no_further(align: int, seed: int) -> None:
    floors: Any = {"attention": align // 4, "ffn": align, "stem": align}
    budget = Budget(9000, None, floors, align=align)
    decisions = descend(budget, seed=seed)
    end = last(decisions)
    assert (end.hidden_size % align, end.ffn_hidden_size % align, end.num_attention_heads * 4 % align) == (0, 0, 0)
    shapes = [ARCH, *(decision.partition.architecture() for decision in decisions)]
    met = next(arch for arch in shapes if arch.num_parameters() <= 9000)
    for now, then, step in (
        (end.hidden_size, met.hidden_size, align),
        (end.ffn_hidden_size, met.ffn_hidden_size, align),
        (end.num_attention_heads, met.num_attention_heads, align // 4),
    ):
        assert now == then // step * step


def test_alignment_leaves_alone_what_may_not_shrink() -> None:
    axes: Any = ["ffn"]
    end = last(descend(Budget(20000, None, FLOORS | {"ffn": 16}, axes, align=16)))
    assert (end.hidden_size, end.num_attention_heads, end.ffn_hidden_size % 16) == (40, 8, 0)


def test_past_the_target_the_least_salient_misaligned_group_goes_first() -> None:
    """A stem channel costs more than an FFN channel here, and both have to go."""
    partition = Partition.of(dataclasses.replace(ARCH, hidden_size=41, ffn_hidden_size=66))
    vectors = mask_removed(SaliencyVectors(np.ones((2, 8)), np.ones((2, 66)), np.full(41, 1e-3)), partition)
    floors: Any = {"attention": 2, "ffn": 8, "stem": 8}
    budget = Budget(10**6, None, floors, align=8)
    decision = choose(vectors, partition, budget, "mean")
    assert decision is not None
    assert decision.group.type == "stem"
