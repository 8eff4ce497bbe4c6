"""A checkpoint of one layout, taken in the middle of pruning, goes on under any other."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

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

SOURCE = Source(heads=6, kv_heads=3)
EVERYWHERE = Layout(tensor=2, pipeline=2, data=2)
#: Six heads go to three ranks, then five; three KV heads lie on two ranks with one of them on both.
LAYOUTS = [Layout(*size) for size in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (3, 1, 1))]
MIDDLE = 3  # steps; the budget is met after 6 or 7
KEEPS_ALL = {"save_interval": MIDDLE, "keep_last": 9}


def moved(runs: Runs, origin: Path, layout: Layout, name: str) -> Path:
    """Continue a run's checkpoint of step ``MIDDLE`` on another layout, in a run directory of its own."""
    directory = runs.root / name
    shutil.copytree(origin, directory)
    for checkpoint in (directory / "checkpoints").iterdir():
        if checkpoint.name != f"step_{MIDDLE:08d}":
            shutil.rmtree(checkpoint)
    flags = runs.flags(SOURCE, layout, directory, **KEEPS_ALL)
    runs.cluster.run(HERE / "layout_worker.py", flags, layout.processes, directory)
    return directory


@pytest.mark.parametrize(
    ("before", "after"),
    [*itertools.permutations(LAYOUTS, 2), (EVERYWHERE, Layout()), (Layout(3), Layout(2, 1, 2, True))],
    ids=str,
)
def test_a_run_moves_between_layouts(runs: Runs, before: Layout, after: Layout) -> None:
    baseline = runs.get(SOURCE, Layout(), **KEEPS_ALL)
    run = moved(runs, runs.get(SOURCE, before, **KEEPS_ALL), after, f"{before}-to-{after}")
    steps = [event["step"] for event in lines(run / "ledger.jsonl")]
    assert min(steps) <= MIDDLE
    assert sum(step > MIDDLE for step in steps) >= 10, "in the middle of pruning"
    assert_same_decisions(run, baseline)
    assert_same_curves(run, baseline)
    assert_same_weights(run, baseline)


def test_the_same_layout_resumes_bit_for_bit(runs: Runs) -> None:
    whole = runs.get(SOURCE, EVERYWHERE, **KEEPS_ALL)
    run = moved(runs, whole, EVERYWHERE, "resumed")
    assert (run / "ledger.jsonl").read_text() == (whole / "ledger.jsonl").read_text()
    for mine, other in zip(*(lines(path / "metrics.jsonl") for path in (run, whole)), strict=True):
        timed = ("tokens_per_second", "mfu")
        assert {k: v for k, v in mine.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    ours, theirs = exported_weights(run), exported_weights(whole)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
