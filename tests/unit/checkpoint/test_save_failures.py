"""A disk that fills up costs a checkpoint, never the older ones, and never leaves half of one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_checkpoint import alone, fragments_of, logical_states, manifest_of, pruned, save_alone

from megatron_prune.checkpoint import directory, writer
from megatron_prune.checkpoint.store import BackgroundSave, Checkpoint, SaveError, newest_checkpoint
from megatron_prune.parallel.mesh import Mesh

CLONE_NEWNS = 0x00020000
TMPFS_BYTES = 4 << 20
LIMIT_BYTES = 1000
TIMEOUT_SECONDS = 60


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    yield alone(tmp_path)
    dist.destroy_process_group()


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("fatal", range(5))
def test_failing_at_any_sync(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, fatal: int, code: int
) -> None:
    """Shard, ledger, manifest, marker, directory: every file is synced, so every file can fail there."""
    first, _ = save_alone(tmp_path, mesh, 1)
    done = [0]

    def full(descriptor: int) -> None:
        done[0] += 1
        if done[0] == fatal + 1:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match=rf"step_00000002 could not be written \(.*{os.strerror(code)}\)") as caught:
        save_alone(tmp_path, mesh, 2)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == [first.name]
    Checkpoint(first)
    second, _ = save_alone(tmp_path, mesh, 2)
    Checkpoint(second)


def test_too_little_room_is_known_before_anything_is_written(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_alone(tmp_path, mesh, 1)
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(writer, "write_shard", lambda *_: pytest.fail("it wrote"))
    with pytest.raises(SaveError, match=r"bytes are needed and 1,000 free"):
        save_alone(tmp_path, mesh, 2)
    with pytest.raises(SaveError, match=r"bytes are needed and 1,000 free"):
        begin(tmp_path, mesh, 2)
    assert names(tmp_path) == ["step_00000001"]


def test_a_full_disk_behind_the_steps(tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread's failure comes out where the ranks meet, not where it happens."""
    save_alone(tmp_path, mesh, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    pending = begin(tmp_path, mesh, 2)
    with pytest.raises(SaveError, match="No space left on device"):
        pending.finish()
    assert names(tmp_path) == ["step_00000001"]


def test_memory_that_cannot_be_had_costs_a_checkpoint(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found after the directory was made, which all ranks are told of."""
    save_alone(tmp_path, mesh, 1)

    empty = torch.empty

    def refuse(size: int, **options: Any) -> Any:
        if "pin_memory" in options:
            raise RuntimeError("can't allocate memory")
        return empty(size, **options)

    with monkeypatch.context() as patch:
        patch.setattr(writer.torch, "empty", refuse)
        fragments = fragments_of(logical_states(pruned(), 2), pruned())
        with pytest.raises(SaveError, match="rank 0: .* bytes of host memory cannot be had"):
            BackgroundSave(tmp_path, manifest_of(pruned(), 2), [], fragments, mesh, 2)
    assert names(tmp_path) == ["step_00000001"]


def test_a_later_step_does_not_push_out_what_is_saved_now(tmp_path: Path, mesh: Mesh) -> None:
    """A run that went back past it (it could not be read) saves earlier steps than those that are there."""
    for step in (9, 2, 3):
        save_alone(tmp_path, mesh, step, keep_last=1)
    assert names(tmp_path) == ["step_00000003", "step_00000009"]


def begin(run_dir: Path, mesh: Mesh, step: int) -> BackgroundSave:
    fragments = fragments_of(logical_states(pruned(), step), pruned())
    return BackgroundSave(run_dir, manifest_of(pruned(), step), [], fragments, mesh, 2)


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A tmpfs in a mount namespace of its own; where that is forbidden, a limit on the size of files."""
    child = multiprocessing.get_context("spawn").Process(target=fill_and_save, args=(tmp_path,))
    child.start()
    child.join(TIMEOUT_SECONDS)
    child.kill()
    report = json.loads((tmp_path / "report.json").read_text())
    assert "step_00000002 could not be written (rank_00000.safetensors:" in report["error"]
    assert report["names"] == report["after"] == ["step_00000001"]
    assert report["newest"] == 1
    assert report["last"] == ["step_00000001", "step_00000002"]


def fill_and_save(tmp_path: Path) -> None:
    """Save; save on a full disk; save when there is room again."""
    run_dir = tmp_path / "disk"
    run_dir.mkdir()
    mounted = mount_small_disk(run_dir)
    mesh = alone(tmp_path)
    report: dict[str, Any] = {}
    save_alone(run_dir, mesh, 1)
    usage = shutil.disk_usage
    # Another job takes the room after it was looked at.
    setattr(directory.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))  # noqa: B010  # mypy: replaced
    if mounted:
        fill(run_dir / "filler")
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, resource.RLIM_INFINITY))
    try:
        save_alone(run_dir, mesh, 2)
    except SaveError as error:
        report["error"] = str(error)
    report["names"] = names(run_dir)
    path = newest_checkpoint(run_dir)
    assert path is not None
    report["newest"] = Checkpoint(path).manifest.progress.step
    report["after"] = names(run_dir)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (run_dir / "filler").unlink(missing_ok=True)
    setattr(directory.shutil, "disk_usage", usage)  # noqa: B010
    save_alone(run_dir, mesh, 2)
    (tmp_path / "report.json").write_text(json.dumps({**report, "last": names(run_dir)}))


def mount_small_disk(place: Path) -> bool:
    """Mount a small tmpfs that only this process sees; False where it may not."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        return False
    for words in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(place)]):
        if subprocess.run(["mount", *words], stderr=subprocess.DEVNULL).returncode:
            return False
    return True


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
