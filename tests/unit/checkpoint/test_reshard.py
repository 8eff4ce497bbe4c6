"""Re-sharding changes where things lie and nothing else, and never holds more than it is writing."""

from __future__ import annotations

import dataclasses
import errno
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.checkpoint import reshard as reshard_module
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.checkpoint.reshard import SavedStates, reshard, state_bytes
from megatron_prune.checkpoint.shards import read_header
from megatron_prune.errors import UserError
from megatron_prune.parallel.fragments import Layout
from megatron_prune.parallel.partition import DEAD

HoldStates = Callable[..., Any]
LAYOUTS = [Layout(), Layout(2), Layout(5), Layout(1, 3), Layout(1, 1, 3), Layout(2, 3, 2)]


def assert_same_states(one: SavedStates, other: SavedStates) -> None:
    """Equal ledger, counters and live tensors, bit for bit."""
    assert one.kinds() == other.kinds()
    assert list(one.events) == list(other.events)
    assert one.manifest.progress == other.manifest.progress
    for spec in one.specs().values():
        for kind in one.kinds():
            assert torch.equal(one.live(spec, kind), other.live(spec, kind)), (kind, spec.name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_states_are_kept_bit_for_bit(tmp_path: Path, hold_states: HoldStates, layout: Layout) -> None:
    saved = hold_states(tied=layout.pipeline % 2 == 1)
    reports: list[int] = []
    path = reshard(saved, tmp_path / "first", layout, 8, reports.append)
    written = Checkpoint(path)
    assert_same_states(written, saved)
    assert sum(reports) == state_bytes(saved) == 12 * saved.manifest.partition.architecture().num_parameters()
    assert len(written.shard_names()) == layout.processes
    again = Checkpoint(reshard(written, tmp_path / "second", Layout(3, 1, 2), 1))
    assert_same_states(again, saved)


def test_without_moments_there_are_only_masters(tmp_path: Path, hold_states: HoldStates) -> None:
    written = Checkpoint(reshard(hold_states(adam_steps=0), tmp_path, Layout(2), 1))
    assert written.kinds() == ("master",)


def test_a_rank_gets_what_it_will_read(tmp_path: Path, hold_states: HoldStates) -> None:
    layout = Layout(2, 3, 2)
    saved = hold_states()
    path = reshard(saved, tmp_path, layout, 1)
    live = saved.manifest.partition.architecture().num_parameters()
    sizes = []
    for rank, name in enumerate(Checkpoint(path).shard_names()):
        stage = rank // (layout.tensor * layout.data)
        pieces = read_header(path / name)
        layers = {key.split(".")[2] for key in pieces if ".layers." in key}
        assert layers == {str(stage)}
        assert {piece.tp_rank for piece in pieces.values()} == {rank % layout.tensor}
        sizes.append(sum(piece.kept for piece in pieces.values()))
    assert sum(sizes) == 3 * live, "live elements once each, no padding"


@pytest.mark.parametrize(("quantum", "hidden", "ffn"), [(1, 29, 21), (8, 30, 22), (4, 30, 22)])
def test_padding_is_what_the_alignment_needs(
    tmp_path: Path, hold_states: HoldStates, quantum: int, hidden: int, ffn: int
) -> None:
    saved = hold_states()
    assert (saved.manifest.partition.stem == DEAD).any()
    partition = Checkpoint(reshard(saved, tmp_path, Layout(2), quantum)).manifest.partition
    assert len(partition.stem) == hidden, "the next multiple, and the source's width at most"
    assert {array.shape for array in partition.ffn} == {(2, ffn)}
    assert {array.shape for array in partition.heads} == {(2, 3)}


def test_the_settings_say_the_new_layout(tmp_path: Path, hold_states: HoldStates) -> None:
    saved = hold_states()
    manifest = Checkpoint(reshard(saved, tmp_path, Layout(2, 3), 1)).manifest
    assert manifest.setting("parallel", "tensor_model_parallel_size") == 2
    assert manifest.setting("parallel", "pipeline_model_parallel_size") == 3
    assert manifest.setting("prune", "target_params") == saved.manifest.setting("prune", "target_params")
    assert saved.manifest.setting("parallel", "tensor_model_parallel_size") == 1


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path, hold_states: HoldStates) -> None:
    saved = hold_states()
    alive: list[weakref.ref[torch.Tensor]] = []
    peak = 0

    def watched(*args: Any) -> torch.Tensor:
        nonlocal peak
        tensor = saved.fragment(*args)
        alive.append(weakref.ref(tensor))
        peak = max(peak, sum(held.nbytes for ref in alive if (held := ref()) is not None))
        return tensor

    class Watched:
        manifest, events = saved.manifest, saved.events
        specs, kinds, live, fragment = saved.specs, saved.kinds, saved.live, staticmethod(watched)

    reshard(Watched(), tmp_path, Layout(1, 1, 2), 1)
    largest = max(tensor.nbytes for tensor in saved.tensors.values())
    assert len(alive) > len(saved.tensors)
    assert largest <= peak <= 2 * largest, "the piece being written and the next one"


def test_nothing_is_overwritten(tmp_path: Path, hold_states: HoldStates) -> None:
    saved = hold_states()
    path = reshard(saved, tmp_path, Layout(), 1)
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="already holds checkpoints"):
        reshard(saved, tmp_path, Layout(2), 1)
    assert (path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(
    tmp_path: Path, hold_states: HoldStates, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write, calls = reshard_module.write_shard, []

    def failing(path: Path, *args: Any) -> str:
        calls.append(path)
        if len(calls) == 2:
            raise error
        return write(path, *args)

    monkeypatch.setattr(reshard_module, "write_shard", failing)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        reshard(hold_states(), tmp_path, Layout(2), 1)
    assert len(calls) == 2
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_more_stages_than_layers_leave_nothing(tmp_path: Path, hold_states: HoldStates) -> None:
    with pytest.raises(UserError, match="--pipeline-model-parallel-size 4"):
        reshard(hold_states(), tmp_path, Layout(1, 4), 1)
    assert not list(tmp_path.iterdir())


def test_settings_of_a_foreign_manifest_survive(tmp_path: Path, hold_states: HoldStates) -> None:
    saved = hold_states()
    saved.manifest = dataclasses.replace(saved.manifest, settings={})
    written = Checkpoint(reshard(saved, tmp_path, Layout(2), 1))
    assert written.manifest.settings == {
        "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1}
    }
