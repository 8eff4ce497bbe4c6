"""Which removals are followed by the second-order update."""

from __future__ import annotations

import dataclasses
from typing import cast

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.ops.saliency import Saliency
from megatron_prune.pruning.planner import Budget
from megatron_prune.pruning.replay import Replay
from megatron_prune.pruning.schedule import Schedule
from megatron_prune.training.pruner import PruneRules

SOURCE = Architecture("llama", 2, 12, 20, 4, uniform_kv_groups(2, 4, 4), 4, 31)
#: As under --target-kv-bytes, which only heads bring nearer.
HEADS_ONLY = Budget(None, None, {"attention": 1, "ffn": 20, "stem": 12}, axes=["attention"], limit=("kv-bytes", 1.0))
RULES = PruneRules(HEADS_ONLY, Schedule(1, 1, 0), "taylor", "mean", 0, cast(Saliency, None), second_order=True)


def test_the_axes_that_are_searched_are_updated() -> None:
    assert RULES.updates == ("attention",)
    assert dataclasses.replace(RULES, second_order=False).updates == ()


def test_all_that_a_ledger_may_remove_is_updated() -> None:
    assert dataclasses.replace(RULES, replay=Replay(SOURCE, ())).updates == ("attention", "ffn", "stem")
