"""Which checkpoint a run takes up, and what becomes of those that it passes over."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_prune.checkpoint import manifest, reader
from megatron_prune.checkpoint.store import Found, damaged_directories, open_newest, save_checkpoint
from megatron_prune.errors import ConfigError, MegatronPruneError, UserError
from megatron_prune.parallel.mesh import Mesh, make_mesh
from megatron_prune.parallel.states import StateFragment
from megatron_prune.training import inputs, resume
from megatron_prune.training.resume import newest_whole, put_aside

SHARD = "rank_00000.safetensors"


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield make_mesh(torch.device("cpu"), 1, 1)
    dist.destroy_process_group()


@pytest.fixture
def run_dir(tmp_path: Path, mesh: Mesh, hold_states: Any) -> Path:
    """A run with checkpoints of steps 4 and 8."""
    for adam_steps in (3, 7):
        states = hold_states(adam_steps=adam_steps)
        partition = states.manifest.partition
        fragments = [
            StateFragment(spec, kind, 0, states.fragment(spec, kind, partition, 0, 0, math.prod(partition.shape(spec))))
            for spec in states.specs().values()
            for kind in states.kinds()
        ]
        save_checkpoint(tmp_path / "run", states.manifest, states.events, fragments, mesh, 2)
    return tmp_path / "run"


def found_in(run_dir: Path, mesh: Mesh) -> Found:
    found = newest_whole(open_newest(run_dir), mesh)
    assert found is not None
    put_aside(found.damaged, mesh)
    return found


def test_the_newest_is_taken_where_it_is_whole(run_dir: Path, mesh: Mesh) -> None:
    assert found_in(run_dir, mesh).checkpoint.path.name == "step_00000008"
    assert damaged_directories(run_dir) == []
    assert newest_whole(None, mesh) is None


def test_a_damaged_one_is_passed_over_and_put_aside(run_dir: Path, mesh: Mesh) -> None:
    flip(run_dir / "checkpoints/step_00000008" / SHARD)
    assert found_in(run_dir, mesh).checkpoint.path.name == "step_00000004"
    assert [path.name for path in damaged_directories(run_dir)] == ["damaged_step_00000008"]


@pytest.mark.parametrize("reading", ["sha256_file", "read_header", "read_file"])
def test_one_that_cannot_be_read_now_keeps_its_name(
    run_dir: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, reading: str
) -> None:
    """At whichever of the reads: shard, header, ledger."""
    module: Any = manifest if reading == "read_file" else reader
    original, stale = getattr(module, reading), OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def flaky(place: Path, *rest: Any) -> Any:
        if "step_00000008" not in str(place):
            return original(place, *rest)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(stale))
            if reading == "read_file":
                return original(place, *rest)
        raise stale

    monkeypatch.setattr(module, reading, flaky)
    found = found_in(run_dir, mesh)
    assert found.checkpoint.path.name == "step_00000004"
    assert "Stale file handle" in found.damaged[0].why
    assert damaged_directories(run_dir) == []


def test_ranks_that_opened_different_ones_stop_before_anything_is_renamed(
    run_dir: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def differ(decision: str, _: Mesh) -> str:
        seen.append(decision)
        raise MegatronPruneError("ranks disagree")

    monkeypatch.setattr(resume, "agreed", differ)
    monkeypatch.setattr(resume, "verify_together", lambda *_: pytest.fail("verified"))
    with pytest.raises(MegatronPruneError, match="disagree"):
        newest_whole(open_newest(run_dir), mesh)
    with pytest.raises(MegatronPruneError, match="disagree"):
        newest_whole(None, mesh)
    assert seen == [str(run_dir / "checkpoints/step_00000008"), "no checkpoint"]


def test_none_that_is_whole_is_said_once_per_node(run_dir: Path) -> None:
    for step in (4, 8):
        (run_dir / f"checkpoints/step_0000000{step}" / "manifest.json").write_text("x")
    config: Any = SimpleNamespace(run=SimpleNamespace(directory=str(run_dir), load=None))
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole") as caught:
        inputs._find_checkpoints(config)
    assert isinstance(caught.value, ConfigError)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
