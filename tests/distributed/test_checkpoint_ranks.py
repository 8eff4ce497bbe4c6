"""Checkpoints of several ranks: in the background, damaged on one of them, and as the start of another run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layout_runs import HERE, Layout, Runs, Source, exported_weights, lines

from megatron_prune.checkpoint.store import Checkpoint, complete_checkpoints, newest_checkpoint

SOURCE = Source(heads=6, kv_heads=3)
LAYOUT = Layout(data=2)
OFTEN: dict[str, Any] = {"save_interval": 4, "keep_last": 9}
LAST, BEFORE_LAST = "step_00000014", "step_00000012"
#: Timings, and what is shown of a removal until the next one.
PASSING = ("tokens_per_second", "mfu", "scores")


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    """A run that saved in the foreground, at steps 4, 8, 12 and at its end."""
    return runs.get(SOURCE, LAYOUT, **OFTEN)


def start(runs: Runs, directory: Path, layout: Layout, *more: str, **changes: Any) -> str:
    """Run in a directory of its own; returns what the first rank printed."""
    directory.mkdir(exist_ok=True)
    flags = [*runs.flags(SOURCE, layout, directory, **changes), *more]
    runs.cluster.run(HERE / "layout_worker.py", flags, layout.processes, directory)
    return (directory / "rank0.log").read_text()


def curve(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in PASSING} for line in lines(run / "metrics.jsonl")]


def test_the_background_writes_the_same_shards(runs: Runs, whole: Path) -> None:
    directory = runs.root / "behind"
    output = start(runs, directory, LAYOUT, "--async-save", **OFTEN)
    paths = [complete_checkpoints(run) for run in (directory, whole)]
    assert [path.name for path in paths[0]] == [path.name for path in paths[1]]
    assert len(paths[0]) == 4
    for mine, other in zip(*paths, strict=True):
        manifests = [Checkpoint(path).manifest for path in (mine, other)]
        assert manifests[0].shards == manifests[1].shards
        assert len(manifests[0].shards) == 2
        assert (manifests[0].ledger, manifests[0].progress) == (manifests[1].ledger, manifests[1].progress)
        assert str(mine) in output
    assert not list((directory / "checkpoints").glob(".*"))


def test_damage_on_one_rank_takes_all_back_together(runs: Runs, whole: Path) -> None:
    directory = runs.root / "damaged"
    shutil.copytree(whole, directory)
    shard = directory / "checkpoints" / LAST / "rank_00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1  # a tensor's: no header shows it
    shard.write_bytes(content)
    output = start(runs, directory, LAYOUT, **OFTEN)
    said = [line for line in output.splitlines() if str(shard) in line]
    assert len(said) == 1
    assert "went back past a damaged checkpoint" in said[0]
    assert "step 12" in said[0]
    names = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert names == [f"damaged_{LAST}", "step_00000004", "step_00000008", BEFORE_LAST, LAST]
    again, first = (Checkpoint(run / "checkpoints" / LAST).manifest for run in (directory, whole))
    assert again.shards == first.shards, "the steps in between are done again, bit for bit"
    assert curve(directory) == curve(whole)


def test_a_run_starts_from_the_weights_of_another(runs: Runs, whole: Path) -> None:
    """No step, no moments, no ledger; on another layout, pruned further, and requeued with the same command."""
    directory, layout = runs.root / "finetuned", Layout(tensor=2)
    base = Checkpoint(whole / "checkpoints" / LAST)
    pruned = base.manifest.partition.architecture()
    flags = ("--load", str(whole), "--finetune")
    changes = {"lr": 1e-12, "target_shape": "hidden=16,ffn=12,heads=3", "prune_start_iter": 1, "lr_warmup_iters": 1}
    output = start(runs, directory, layout, *flags, train_iters=2, **changes)
    assert f"starting from the weights of {base.path}" in output
    path = newest_checkpoint(directory)
    assert path is not None
    manifest = Checkpoint(path).manifest
    assert (manifest.progress.step, manifest.progress.adam_steps, manifest.progress.consumed_samples) == (2, 2, 8)
    assert manifest.partition.source == pruned
    assert manifest.partition.architecture().num_parameters() < pruned.num_parameters()
    theirs, specs = exported_weights(whole), base.specs()
    for name, tensor in exported_weights(directory).items():
        where = [manifest.partition.live_elements(axis, specs[name].layer) for axis in specs[name].axes]
        assert torch.allclose(tensor, theirs[name][np.ix_(*where)], atol=1e-7), name

    output = start(runs, directory, layout, *flags, train_iters=3, **changes)
    assert f"resuming {directory}" in output
    ledger = lines(directory / "ledger.jsonl")
    assert [event["event"] for event in ledger] == list(range(1, len(ledger) + 1))
    assert {event["step"] for event in ledger} == {2, 3}
    assert [line["step"] for line in curve(directory) if "loss" in line] == [1, 2, 3]
