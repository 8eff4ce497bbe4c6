"""A ledger repeated: same groups whatever the order; refused where it does not fit."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.errors import UserError
from megatron_prune.parallel.partition import Partition, live
from megatron_prune.pruning.groups import GROUP_TYPES, GroupType, MiniGroup
from megatron_prune.pruning.ledger import Event, Ledger, shape_of
from megatron_prune.pruning.planner import Budget, choose
from megatron_prune.pruning.replay import Replay, read_replay
from megatron_prune.pruning.saliency import random_vectors

ARCH = Architecture(
    family="llama",
    num_layers=2,
    hidden_size=12,
    ffn_hidden_size=16,
    num_attention_heads=6,
    kv_groups=uniform_kv_groups(2, 6, 3),
    head_dim=4,
    vocab_size=10,
    tie_embeddings=True,
)
GOAL: dict[GroupType, int] = {"attention": 2, "ffn": 7, "stem": 6}


def pruned(path: Path, mode: Any = "cluster") -> Partition:
    """Prune by random scores down to the goal and leave a ledger."""
    budget = Budget(None, GOAL, {"attention": 1, "ffn": 1, "stem": 1}, gqa_mode=mode)
    partition, ledger = Partition.of(ARCH), Ledger(path)
    for step in itertools.count():
        arch = partition.architecture()
        if budget.met(arch):
            return partition
        decision = choose(random_vectors(partition, 3, step), partition, budget, "mean")
        assert decision is not None
        group, partition = decision.group, decision.partition
        after = partition.architecture()
        number, scores = len(ledger.events) + 1, {str(kind): score for kind, score in decision.scores.items()}
        event = Event(number, step, step, group.type, group.listed(), scores, shape_of(after), after.num_parameters())
        ledger.append(event)
    raise AssertionError


def replayed(replay: Replay, partition: Partition) -> tuple[list[MiniGroup], Partition]:
    groups = []
    while (decision := replay.next(partition)) is not None:
        groups.append(decision.group)
        partition = decision.partition
    return groups, partition


def units_left(partition: Partition) -> list[list[int]]:
    return [
        np.unique(live(slots)).tolist()
        for slots in (partition.stem, *partition.ffn, *partition.heads, *partition.kv_heads)
    ]


@pytest.mark.parametrize("mode", ["cluster", "balanced"])
@pytest.mark.parametrize("order", [None, *itertools.permutations(GROUP_TYPES)])
def test_any_order_and_layout_leaves_the_same_units(tmp_path: Path, mode: str, order: Any) -> None:
    original = pruned(tmp_path / "ledger.jsonl", mode)
    replay = read_replay(tmp_path / "ledger.jsonl", ARCH, order)
    groups, partition = replayed(replay, Partition.of(ARCH, 2))
    assert units_left(partition) == units_left(original)
    assert partition.architecture() == original.architecture()
    assert replay.end() == GOAL
    kinds = [kind for kind, _ in itertools.groupby(group.type for group in groups)]
    assert order is None or tuple(kinds) == order


def test_the_ledgers_own_order_and_scores_are_kept(tmp_path: Path) -> None:
    pruned(tmp_path / "ledger.jsonl")
    replay = read_replay(tmp_path / "ledger.jsonl", ARCH)
    groups, _ = replayed(replay, Partition.of(ARCH))
    assert groups == [event.group for event in replay.events]
    first = replay.next(Partition.of(ARCH))
    assert first is not None
    assert first.scores == replay.events[0].scores


@pytest.mark.parametrize("done", [1, 7, 15])
def test_a_run_goes_on_where_its_model_is(tmp_path: Path, done: int) -> None:
    pruned(tmp_path / "ledger.jsonl")
    replay = read_replay(tmp_path / "ledger.jsonl", ARCH)
    partition = Partition.of(ARCH)
    for event in replay.events[:done]:
        decision = replay.next(partition)
        assert decision is not None
        assert decision.group == event.group
        partition = decision.partition
    replay.check(partition)
    other = read_replay(tmp_path / "ledger.jsonl", ARCH, ("stem", "ffn", "attention"))
    other.check(partition)  # the order may change on the way
    assert units_left(replayed(other, partition)[1]) == units_left(replayed(replay, partition)[1])


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    pruned(tmp_path / "ledger.jsonl")
    replay = read_replay(tmp_path / "ledger.jsonl", ARCH)
    stem = [event.removed for event in replay.events if event.type == "stem"]
    wrong = next(index for index in range(12) if index != stem[0])
    gone = Partition.of(ARCH)
    gone = dataclasses.replace(gone, stem=np.where(gone.stem == wrong, -1, gone.stem))
    with pytest.raises(UserError, match="has lost other groups"):
        replay.check(gone)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (dataclasses.replace(ARCH, num_layers=3, kv_groups=uniform_kv_groups(3, 6, 3)), "of 2 layer.s., not of 3"),
        (dataclasses.replace(ARCH, hidden_size=6), "beyond the source's 6"),
        (dataclasses.replace(ARCH, vocab_size=11), "where this source would have"),
    ],
)
def test_a_ledger_of_another_source_is_refused(tmp_path: Path, source: Architecture, match: str) -> None:
    pruned(tmp_path / "ledger.jsonl")
    with pytest.raises(UserError, match=match):
        read_replay(tmp_path / "ledger.jsonl", source)


def test_a_ledger_with_an_event_twice_or_none_is_refused(tmp_path: Path) -> None:
    pruned(tmp_path / "ledger.jsonl")
    path, lines = tmp_path / "broken.jsonl", (tmp_path / "ledger.jsonl").read_text().splitlines()
    path.write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(UserError, match="goes twice"):
        read_replay(path, ARCH)
    path.write_text("")
    with pytest.raises(UserError, match="it is empty"):
        read_replay(path, ARCH)


def test_an_order_has_to_name_what_the_ledger_removes(tmp_path: Path) -> None:
    pruned(tmp_path / "ledger.jsonl")
    with pytest.raises(UserError, match="lacks attention"):
        read_replay(tmp_path / "ledger.jsonl", ARCH, ("stem", "ffn"))


@pytest.mark.parametrize("order", list(itertools.permutations(GROUP_TYPES)))
def test_a_forced_order_reaches_exactly_the_named_shape(order: tuple[GroupType, ...]) -> None:
    budget = Budget(None, GOAL, {"attention": 1, "ffn": 1, "stem": 1}, order=order)
    partition = Partition.of(ARCH)
    kinds: list[GroupType] = []
    while not budget.met(partition.architecture()):
        decision = choose(random_vectors(partition, 1, len(kinds)), partition, budget, "mean")
        assert decision is not None
        kinds.append(decision.group.type)
        partition = decision.partition
    assert [kind for kind, _ in itertools.groupby(kinds)] == list(order)
    assert shape_of(partition.architecture()) == {
        "hidden_size": 6,
        "ffn_hidden_size": 7,
        "num_attention_heads": 2,
    }
