"""An offline re-shard divides as DeepSpeed does, and a run goes on from it as if it had never been interrupted."""

from __future__ import annotations

import shutil

import pytest
from layout_runs import HERE, Layout, Runs, Source, assert_same_curves, assert_same_decisions, assert_same_weights

from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.checkpoint.reshard import reshard
from megatron_prune.checkpoint.shards import read_header
from megatron_prune.parallel import fragments

SOURCE = Source(heads=6, kv_heads=3)
MIDDLE = 4  # steps, as in test_moves.py, whose runs these are; the budget is met after 7
KEEPS_ALL = {"save_interval": MIDDLE, "keep_last": 9}
STEP = f"checkpoints/step_{MIDDLE:08d}"


@pytest.mark.parametrize("layout", [Layout(2, 2, 2), Layout(1, 1, 2), Layout(2, 2, 1)], ids=str)
def test_fragments_are_divided_as_deepspeed_divides_them(runs: Runs, layout: Layout) -> None:
    checkpoint = Checkpoint(runs.get(SOURCE, layout, **KEEPS_ALL) / STEP)
    theirs = {
        (rank, key): (piece.tp_rank, piece.start, piece.numel)
        for rank, name in enumerate(checkpoint.shard_names())
        for key, piece in read_header(checkpoint.path / name).items()
    }
    sizes = fragments.Layout(layout.tensor, layout.pipeline, layout.data)
    ours = {
        (place.rank, f"{kind}/{place.spec.name}"): (place.tp_rank, place.start, place.numel)
        for place in fragments.fragment_places(checkpoint.manifest.partition, sizes)
        for kind in checkpoint.kinds()
    }
    assert ours == theirs


def test_a_resharded_run_goes_on(runs: Runs) -> None:
    origin, directory = runs.get(SOURCE, Layout(2, 2, 2), **KEEPS_ALL), runs.root / "resharded"
    reshard(Checkpoint(origin / STEP), directory, fragments.Layout(data=2), 8)
    shutil.copy(origin / "metrics.jsonl", directory)
    flags = runs.flags(SOURCE, Layout(data=2), directory, **KEEPS_ALL)
    runs.cluster.run(HERE / "layout_worker.py", flags, 2, directory)
    baseline = runs.get(SOURCE, Layout(), **KEEPS_ALL)
    assert_same_decisions(directory, baseline)
    assert_same_curves(directory, baseline)
    assert_same_weights(directory, baseline)
