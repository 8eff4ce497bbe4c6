"""Grouped heads both ways, replayed ledgers, forced orders and other budgets, on whole runs."""

from __future__ import annotations

import itertools
import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layout_runs import (
    HERE,
    Layout,
    Runs,
    Source,
    assert_same_curves,
    assert_same_decisions,
    assert_same_weights,
    exported_weights,
    lines,
)

from megatron_prune.architecture import Architecture
from megatron_prune.checkpoint.store import Checkpoint, newest_checkpoint
from megatron_prune.config import Config, load_config
from megatron_prune.parallel.partition import Partition, live
from megatron_prune.pruning.cost import LatencyTable
from megatron_prune.training.latency import about_table, write_table

#: EfficientLLM-134M's heads: 15 queries on 5 K/V heads, down to 5 queries.
SOURCE = Source(heads=15, kv_heads=5)
HEADS = {"target_shape": "hidden=24,ffn=20,heads=5"}
MIDDLE = 4  # steps; the target is met after 10
KEEPS_ALL = HEADS | {"save_interval": MIDDLE, "keep_last": 9}
BOTH = pytest.mark.parametrize("mode", ["cluster", "balanced"])


def placement(run: Path) -> Partition:
    path = newest_checkpoint(run)
    assert path is not None
    return Checkpoint(path).manifest.partition


def units_left(run: Path) -> list[set[int]]:
    found = placement(run)
    return [set(live(slots).tolist()) for slots in (found.stem, *found.ffn, *found.heads, *found.kv_heads)]


def run_with(runs: Runs, name: str, layout: Layout, **changes: Any) -> Path:
    directory = runs.root / name
    directory.mkdir(exist_ok=True)
    runs.cluster.run(
        HERE / "layout_worker.py", runs.flags(SOURCE, layout, directory, **changes), layout.processes, directory
    )
    return directory


@BOTH
def test_tensor_parallel_ranks_choose_the_same_queries(runs: Runs, mode: str) -> None:
    one, two = (runs.get(SOURCE, Layout(tensor), gqa_mode=mode, **KEEPS_ALL) for tensor in (1, 2))
    assert_same_decisions(two, one)
    assert_same_curves(two, one)
    assert_same_weights(two, one)
    for event in (event for event in lines(two / "ledger.jsonl") if event["type"] == "attention"):
        for heads in event["removed"]:
            assert [head // 3 for head in heads] == [0, 1, 2, 3, 4] if mode == "balanced" else isinstance(heads, int)


@BOTH
def test_kv_heads_live_as_long_as_their_queries(runs: Runs, mode: str) -> None:
    found = placement(runs.get(SOURCE, Layout(2), gqa_mode=mode, **KEEPS_ALL))
    for layer in range(SOURCE.layers):
        assert {head // 3 for head in live(found.heads[layer])} == set(live(found.kv_heads[layer]))
    arch = found.architecture()
    assert arch.num_attention_heads == 5
    assert arch.uniform_kv == (mode == "balanced")


@BOTH
def test_exports_load_and_only_uneven_groups_are_repeated(
    runs: Runs, mode: str, tmp_path: Path, repo_root: Path
) -> None:
    from transformers import AutoModelForCausalLM

    run = runs.get(SOURCE, Layout(2), gqa_mode=mode, **KEEPS_ALL)
    tool = runpy.run_path(str(repo_root / "tools" / "convert_to_hf.py"))
    assert tool["main"](["--load", str(run), "--save", str(tmp_path / "out")]) == 0  # compares logits
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_key_value_heads == 5
    stored = model.state_dict()
    same = {name: stored[name].shape == tensor.shape for name, tensor in exported_weights(run).items()}
    assert all(same.values()) == (mode == "balanced")
    assert all(torch.equal(stored[name], tensor) for name, tensor in exported_weights(run).items() if same[name])


def resumed_alone(runs: Runs, whole: Path, name: str, **changes: Any) -> Path:
    """A copy of a run, gone on with from its middle by one process."""
    directory = runs.root / name
    shutil.copytree(whole, directory)
    for checkpoint in (directory / "checkpoints").iterdir():
        if checkpoint.name != f"step_{MIDDLE:08d}":
            shutil.rmtree(checkpoint)
    return run_with(runs, name, Layout(), **changes)


def test_a_mean_of_the_saliency_decides_on_any_layout_and_after_a_stop(runs: Runs) -> None:
    smoothed = {"saliency_ema": 0.8, "gqa_mode": "cluster", **KEEPS_ALL}
    whole = runs.get(SOURCE, Layout(1, 2), **smoothed)
    directory = resumed_alone(runs, whole, "resumed-mean", **smoothed)
    assert_same_decisions(directory, whole)
    assert_same_weights(directory, whole)
    plain = lines(runs.get(SOURCE, Layout(2), gqa_mode="cluster", **KEEPS_ALL) / "ledger.jsonl")
    events = lines(whole / "ledger.jsonl")
    assert events[0]["removed"] == plain[0]["removed"], "the mean of one is that one"
    assert [event["removed"] for event in events] != [event["removed"] for event in plain]


@BOTH
def test_a_run_resumes_between_two_heads_on_fewer_ranks(runs: Runs, mode: str) -> None:
    whole = runs.get(SOURCE, Layout(2), gqa_mode=mode, **KEEPS_ALL)
    directory = resumed_alone(runs, whole, f"resumed-{mode}", gqa_mode=mode, **KEEPS_ALL)
    kinds = [event["type"] for event in lines(directory / "ledger.jsonl") if event["step"] > MIDDLE]
    assert "attention" in kinds
    assert_same_decisions(directory, whole)
    assert_same_weights(directory, whole)


@BOTH
def test_a_replay_leaves_the_same_units_in_another_order_and_pace(runs: Runs, mode: str) -> None:
    original = runs.get(SOURCE, Layout(2), gqa_mode=mode, **KEEPS_ALL)
    changes = {"trajectory": "stem,attention,ffn", "prune_ratio": "40:1", "target_shape": None}
    run = run_with(runs, f"replayed-{mode}", Layout(1, 2), replay=original / "ledger.jsonl", **changes)
    assert units_left(run) == units_left(original)
    events, origin = lines(run / "ledger.jsonl"), lines(original / "ledger.jsonl")
    assert [kind for kind, _ in itertools.groupby(event["type"] for event in events)] == ["stem", "attention", "ffn"]
    for kind in ("stem", "attention", "ffn"):
        removed = [[event["removed"] for event in side if event["type"] == kind] for side in (events, origin)]
        assert removed[0] == removed[1]
    assert events[-1]["shape"] == origin[-1]["shape"]
    assert events[-1]["step"] < origin[-1]["step"]


def test_a_forced_order_reaches_the_named_shape(runs: Runs) -> None:
    run = runs.get(SOURCE, Layout(2), trajectory="ffn,stem,attention", **HEADS)
    events = lines(run / "ledger.jsonl")
    assert [kind for kind, _ in itertools.groupby(event["type"] for event in events)] == ["ffn", "stem", "attention"]
    assert events[-1]["shape"] == {"hidden_size": 24, "ffn_hidden_size": 20, "num_attention_heads": 5}


def test_a_latency_goes_by_the_table_of_the_run(runs: Runs) -> None:
    """The table is the first process's; no time is taken here."""
    changes = {"target_shape": None, "target_latency_ms": 2.5, "prune_cost": "latency", "gqa_mode": "balanced"}
    directory = runs.root / "latency"
    flags = runs.flags(SOURCE, Layout(2), directory, **changes, final_align=4)
    config, source = load_config(flags), source_architecture(runs)
    table = pretended_table(config, source)
    write_table(directory, table)
    run = run_with(runs, "latency", Layout(2), **changes, final_align=4)
    assert LatencyTable.from_dict(json.loads((run / "latency.json").read_text())).to_dict() == table.to_dict()
    end = placement(run).architecture()
    assert table.milliseconds_of(end.hidden_size, end.ffn_hidden_size, end.num_attention_heads) <= 2.5
    assert (end.hidden_size % 4, end.ffn_hidden_size % 4) == (0, 0)
    # Queries are nearly all of the time in this table, and so they go.
    assert end.num_attention_heads < SOURCE.kv_heads
    assert end.hidden_size > 30


def source_architecture(runs: Runs) -> Architecture:
    return placement(runs.get(SOURCE, Layout(2), gqa_mode="balanced", **KEEPS_ALL)).source


def pretended_table(config: Config, source: Architecture) -> LatencyTable:
    knots = ((8, 40), (8, 64), (1, 5, 15))
    times = [0.01 * d / 40 + 0.01 * f / 64 + h for d in knots[0] for f in knots[1] for h in knots[2]]
    return LatencyTable.of(knots, np.array(times).reshape(2, 2, 3), about_table(config, source))
