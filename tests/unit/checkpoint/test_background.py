"""Writing behind the steps: the state of the moment it began, byte for byte what a foreground save writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tiny_checkpoint import alone, event, fragments_of, logical_states, manifest_of, pruned, save_alone

from megatron_prune.checkpoint import shards, writer
from megatron_prune.checkpoint.store import BackgroundSave, Checkpoint, newest_checkpoint
from megatron_prune.parallel.mesh import Mesh


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    yield alone(tmp_path)
    dist.destroy_process_group()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The disk writes nothing until this is set."""
    go = threading.Event()
    original = writer.write_shard

    def patient(*arguments: Any) -> str:
        assert threading.current_thread().name == "checkpoint"
        assert go.wait(timeout=30)
        return original(*arguments)

    monkeypatch.setattr(writer, "write_shard", patient)
    return go


def test_the_same_files_as_in_the_foreground(tmp_path: Path, mesh: Mesh, held: threading.Event) -> None:
    fragments = fragments_of(logical_states(pruned(), 3), pruned())
    events = [event(3)]
    pending = BackgroundSave(tmp_path / "behind", manifest_of(pruned(), 3), events, fragments, mesh, 2)
    assert not pending.written()
    assert newest_checkpoint(tmp_path / "behind") is None
    for fragment in fragments:  # training goes on
        fragment.values.fill_(float("nan"))
    events.append(event(4))
    held.set()
    behind = pending.finish()
    assert pending.written()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "write_shard", shards.write_shard)
        before, _ = save_alone(tmp_path / "before", mesh, 3)
    files = sorted(path.name for path in before.iterdir())
    assert files == sorted(path.name for path in behind.iterdir())
    for name in files:
        assert (before / name).read_bytes() == (behind / name).read_bytes(), name
    Checkpoint(behind)


def test_older_ones_go_when_it_is_whole(tmp_path: Path, mesh: Mesh) -> None:
    for step in (1, 2, 3):
        fragments = fragments_of(logical_states(pruned(), step), pruned())
        pending = BackgroundSave(tmp_path, manifest_of(pruned(), step), [event(step)], fragments, mesh, 2)
        assert pending.finish().name == f"step_0000000{step}"
    for thread in threading.enumerate():
        if thread.name == "retired checkpoints":
            thread.join(30)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]
