"""Which query heads go together, and what becomes of their K/V heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.config.targets import reachable_heads, shape_between
from megatron_prune.parallel.partition import Partition, live
from megatron_prune.pruning.gqa import heads_at_once, least_heads
from megatron_prune.pruning.groups import MiniGroup, remove, units
from megatron_prune.pruning.ledger import Event, Ledger, parse_ledger, replay
from megatron_prune.pruning.planner import Budget, Decision, choose, strike_out
from megatron_prune.pruning.saliency import FloatArray, SaliencyVectors, mask_removed

#: EfficientLLM-134M's source in small: 15 query heads on 5 K/V heads.
ARCH = Architecture(
    family="llama",
    num_layers=3,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=15,
    kv_groups=uniform_kv_groups(3, 15, 5),
    head_dim=4,
    vocab_size=10,
    tie_embeddings=True,
)


def vectors(heads: FloatArray, partition: Partition) -> SaliencyVectors:
    whole = SaliencyVectors(heads, np.full((3, 12), 1e9), np.full(8, 1e9))
    return mask_removed(whole, partition)


def budget(mode: Any, heads: int) -> Budget:
    shape: Any = {"attention": heads, "ffn": 12, "stem": 8}
    return Budget(None, shape, {"attention": 1, "ffn": 1, "stem": 1}, gqa_mode=mode)


def descend(mode: Any, heads: int, seed: int) -> list[Decision]:
    """Decisions down to so many heads, new random scores at each."""
    partition, goal, decisions = Partition.of(ARCH), budget(mode, heads), []
    draw = np.random.default_rng(seed)
    while not goal.met(partition.architecture()):
        decision = choose(vectors(draw.random((3, 15)), partition), partition, goal, "mean")
        assert decision is not None
        decisions.append(decision)
        partition = decision.partition
    return decisions


@pytest.mark.parametrize("seed", range(5))
def test_balanced_takes_the_least_query_of_every_kv_head(seed: int) -> None:
    scores = np.random.default_rng(seed).random((3, 15))
    partition = Partition.of(ARCH)
    expected = tuple(
        tuple(min(range(3 * kv, 3 * kv + 3), key=lambda head: scores[layer, head]) for kv in range(5))
        for layer in range(3)
    )
    decision = choose(vectors(scores, partition), partition, budget("balanced", 5), "mean")
    assert decision is not None
    assert decision.group == MiniGroup("attention", expected)
    mean = np.mean([scores[layer, head] for layer, row in enumerate(expected) for head in row])
    assert decision.scores["attention"] == pytest.approx(mean / (8 * 4))
    assert units("attention", ARCH, decision.group.size) == 5 * 4


@pytest.mark.parametrize("seed", range(3))
def test_balanced_is_stock_gqa_at_every_event(seed: int) -> None:
    partitions = [Partition.of(ARCH), *(decision.partition for decision in descend("balanced", 1, seed))]
    shapes = [partition.architecture() for partition in partitions]
    assert [arch.num_attention_heads for arch in shapes] == [15, 10, 5, 4, 3, 2, 1]
    assert [arch.num_query_groups for arch in shapes] == [5, 5, 5, 4, 3, 2, 1]
    assert all(arch.uniform_kv for arch in shapes)
    assert reachable_heads(ARCH, "balanced") == sorted(arch.num_attention_heads for arch in shapes)
    for arch in shapes:  # what is planned with is what happens
        assert arch == shape_between(ARCH, 8, 12, arch.num_attention_heads, "balanced")


@pytest.mark.parametrize("mode", ["cluster", "balanced"])
def test_a_kv_head_lives_as_long_as_its_last_query(mode: Any) -> None:
    for decision in descend(mode, 1, seed=7):
        partition = decision.partition
        for layer in range(3):
            readers = {head // 3 for head in live(partition.heads[layer]).tolist()}
            assert set(live(partition.kv_heads[layer]).tolist()) == readers


def test_cluster_lets_layers_differ() -> None:
    arch = descend("cluster", 5, seed=1)[-1].partition.architecture()
    assert arch.num_attention_heads == 5
    assert len({len(groups) for groups in arch.kv_groups}) > 1
    assert not arch.uniform_kv


def test_a_whole_kv_head_goes_once_each_has_one_query() -> None:
    partition = Partition.of(ARCH)
    kept = [[0, 4, 8, 9, 14], [2, 3, 7, 10, 12], [1, 5, 6, 11, 13]]
    gone = tuple(tuple(head for head in range(15) if head not in row) for row in kept)
    partition = remove(partition, MiniGroup("attention", gone))
    assert heads_at_once(partition, "balanced") == 1
    scores = np.arange(45, dtype=np.float64).reshape(3, 15)[:, ::-1].copy()
    masked = vectors(scores, partition)
    assert least_heads(masked.heads, partition, "balanced").tolist() == [[14], [12], [13]]


def test_what_was_chosen_is_out_of_reach_of_the_next_choice() -> None:
    partition, goal = Partition.of(ARCH), budget("balanced", 5)
    scores = vectors(np.random.default_rng(3).random((3, 15)), partition)
    first = choose(scores, partition, goal, "mean")
    assert first is not None
    second = choose(strike_out(scores, first.group), first.partition, goal, "mean")
    assert second is not None
    for layer in range(3):
        assert not set(first.group.indices(layer)) & set(second.group.indices(layer))
    assert second.partition.architecture().kv_groups == ((1,) * 5,) * 3


def test_a_target_between_two_removals_is_not_overshot() -> None:
    partition = Partition.of(ARCH)
    assert choose(vectors(np.ones((3, 15)), partition), partition, budget("balanced", 12), "mean") is None


@pytest.mark.parametrize("mode", ["cluster", "balanced"])
def test_stages_that_know_their_own_layers_choose_alike(mode: Any) -> None:
    partition, goal = Partition.of(ARCH), budget(mode, 5)
    whole = vectors(np.random.default_rng(5).random((3, 15)), partition)
    first, second = (whole.heads.copy() for _ in range(2))
    first[1:], second[:1] = 0, 0  # as accumulate leaves the layers of other stages
    rows: list[FloatArray] = []

    def remember(minima: FloatArray) -> FloatArray:
        rows.append(minima)
        return minima

    for heads in (first, second):
        choose(SaliencyVectors(heads, whole.ffn, whole.stem), partition, goal, "mean", remember)
    joined = np.concatenate([rows[0][:1], rows[1][1:]])
    expected = choose(whole, partition, goal, "mean")
    found = choose(SaliencyVectors(first, whole.ffn, whole.stem), partition, goal, "mean", lambda _: joined)
    assert expected is not None
    assert found is not None
    assert (found.group, found.scores) == (expected.group, expected.scores)


def test_a_ledger_line_lists_the_heads_of_every_layer(tmp_path: Path) -> None:
    decisions = descend("balanced", 4, seed=2)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for number, decision in enumerate(decisions, 1):
        arch = decision.partition.architecture()
        removed = decision.group.listed()
        ledger.append(Event(number, 1, 1, "attention", removed, {}, {}, arch.num_parameters()))
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [len(line["removed"][0]) if isinstance(line["removed"][0], list) else 1 for line in lines] == [5, 5, 1]
    events = parse_ledger((tmp_path / "ledger.jsonl").read_bytes())
    assert events == ledger.events
    assert [event.group for event in events] == [decision.group for decision in decisions]
    assert replay(ARCH, events).to_dict() == decisions[-1].partition.to_dict()
