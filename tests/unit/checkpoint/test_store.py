"""Checkpoint directories: what counts as complete, what is refused, and that dead padding is not stored."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_checkpoint import SPECS, alone, event, pruned, save_alone, save_split, sign

from megatron_prune.checkpoint import directory
from megatron_prune.checkpoint.manifest import FORMAT, Progress
from megatron_prune.checkpoint.store import (
    Checkpoint,
    DamagedCheckpoint,
    complete_checkpoints,
    newest_checkpoint,
    open_newest,
    set_aside,
)
from megatron_prune.errors import UserError
from megatron_prune.parallel.mesh import Mesh


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    yield alone(tmp_path)
    dist.destroy_process_group()


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_what_is_saved_is_what_is_read(tmp_path: Path, mesh: Mesh) -> None:
    path, states = save_alone(tmp_path, mesh, 3)
    checkpoint = Checkpoint(path)
    for (name, kind), tensor in states.items():
        assert torch.equal(checkpoint.live(SPECS[name], kind), tensor)
    assert checkpoint.specs() == SPECS
    assert checkpoint.kinds() == ("master", "exp_avg", "exp_avg_sq")
    assert checkpoint.manifest.progress == Progress(step=3, adam_steps=3, events=1, exported=("1K",))
    assert checkpoint.events == [event(3)]
    stored = load_file(path / "rank_00000.safetensors")
    live = checkpoint.manifest.partition.architecture().num_parameters()
    assert sum(tensor.numel() for tensor in stored.values()) == 3 * live, "dead padding is not stored"
    assert torch.equal(stored["master/model.norm.weight"], states["model.norm.weight", "master"])


def test_incomplete_directories_are_not_checkpoints(tmp_path: Path, mesh: Mesh) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert open_newest(tmp_path) is None
    path, _ = save_alone(tmp_path, mesh, 3)
    later, _ = save_alone(tmp_path, mesh, 12)
    (later / "COMPLETE").unlink()
    (tmp_path / "checkpoints" / "step_x").mkdir()
    assert newest_checkpoint(tmp_path) == path


def test_leftovers_go_and_the_last_two_stay(tmp_path: Path, mesh: Mesh) -> None:
    for stale in (".writing_step_00000001", ".removing_step_00000001", ".writing_step_00000007"):
        (tmp_path / "checkpoints" / stale / "deep").mkdir(parents=True)
    for step in (1, 2, 100_000_000):
        save_alone(tmp_path, mesh, step)
    assert names(tmp_path) == ["step_00000002", "step_100000000"]
    assert [p.name for p in complete_checkpoints(tmp_path)] == names(tmp_path)


def test_a_link_is_no_step(tmp_path: Path, mesh: Mesh) -> None:
    elsewhere, _ = save_alone(tmp_path / "other", mesh, 9)
    path, _ = save_alone(tmp_path, mesh, 3)
    link = path.with_name("step_00000009")
    link.symlink_to(elsewhere)
    assert newest_checkpoint(tmp_path) == path
    found = open_newest(tmp_path)
    assert found is not None
    assert found.checkpoint.path == path
    save_alone(tmp_path, mesh, 10, keep_last=1)
    assert sorted(names(tmp_path)) == ["step_00000009", "step_00000010"], "nor does it count as one of the last"
    save_alone(tmp_path, mesh, 9)
    assert not link.is_symlink()
    assert sorted(names(tmp_path)) == ["step_00000009", "step_00000010"]
    Checkpoint(elsewhere)


def test_saving_the_same_step_again_replaces_it(tmp_path: Path, mesh: Mesh) -> None:
    first, _ = save_alone(tmp_path, mesh, 5)
    (first / "mark").touch()
    second, _ = save_alone(tmp_path, mesh, 5)
    assert first == second
    assert not (second / "mark").exists()
    Checkpoint(second)
    assert names(tmp_path) == ["step_00000005"]


class Killed(BaseException):
    """What a process does not get over."""


@pytest.mark.parametrize("fatal", range(6))
def test_a_kill_between_any_two_renames_leaves_the_step(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, fatal: int
) -> None:
    """Of a step saved again, one version is whole at every moment, and the next save tidies up."""
    _, before = save_alone(tmp_path, mesh, 5)
    done, rename = [0], os.rename

    def mortal(source: Path, target: Path) -> None:
        if done[0] == fatal:
            raise Killed
        done[0] += 1
        rename(source, target)

    monkeypatch.setattr(Path, "rename", mortal)
    try:
        save_alone(tmp_path, mesh, 5)
    except Killed:
        assert done[0] == fatal
    monkeypatch.undo()
    found = open_newest(tmp_path)
    assert found is not None
    Checkpoint(found.checkpoint.path)
    assert found.checkpoint.manifest.progress.step == 5
    assert torch.equal(found.checkpoint.live(SPECS["model.norm.weight"]), before["model.norm.weight", "master"])
    save_alone(tmp_path, mesh, 5)
    save_alone(tmp_path, mesh, 6)
    assert names(tmp_path) == ["step_00000005", "step_00000006"]


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "manifest.json", "ledger.jsonl", "COMPLETE"])
def test_missing_files_are_named(tmp_path: Path, mesh: Mesh, name: str) -> None:
    path, _ = save_alone(tmp_path, mesh, 1)
    (path / name).unlink()
    with pytest.raises(UserError, match=name):
        Checkpoint(path)


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "manifest.json", "ledger.jsonl", "COMPLETE"])
def test_links_and_pipes_are_refused(tmp_path: Path, mesh: Mesh, name: str) -> None:
    path, _ = save_alone(tmp_path, mesh, 1)
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match=f"{name} is no regular file"):
        Checkpoint(path)
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(DamagedCheckpoint, match=f"{name} is no regular file"):
        Checkpoint(path)


@pytest.mark.parametrize("name", ["../step_00000002/rank_00000.safetensors", "/etc/passwd", "rank_0.safetensors", ""])
def test_paths_cannot_leave_the_directory(tmp_path: Path, mesh: Mesh, name: str) -> None:
    save_alone(tmp_path, mesh, 2)
    path, _ = save_alone(tmp_path, mesh, 3)
    content = json.loads((path / "manifest.json").read_text())
    content["shards"] = {name: next(iter(content["shards"].values()))}
    sign(path, content)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is no manifest of ours .*is no name of a shard"):
        Checkpoint(path)


def test_an_older_format_says_so(tmp_path: Path, mesh: Mesh) -> None:
    """Format 2 had an empty marker. It is no damage: nothing older is tried."""
    save_alone(tmp_path, mesh, 1)
    path, _ = save_alone(tmp_path, mesh, 2)
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**content, "format": 2}))
    (path / "COMPLETE").write_text("")
    with pytest.raises(UserError, match=f"has format 2, this version reads {FORMAT}") as caught:
        open_newest(tmp_path)
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_a_directory_of_another_step_is_passed_over(tmp_path: Path, mesh: Mesh) -> None:
    first, _ = save_alone(tmp_path, mesh, 1)
    second, _ = save_alone(tmp_path, mesh, 2)
    second.rename(second.with_name("step_00000009"))
    found = open_newest(tmp_path)
    assert found is not None
    assert found.checkpoint.path == first
    assert "is of step 2" in found.damaged[0].why


def test_none_whole_is_an_error_that_names_the_newest(tmp_path: Path, mesh: Mesh) -> None:
    for step in (1, 2):
        path, _ = save_alone(tmp_path, mesh, step)
        (path / "ledger.jsonl").write_text("")
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole.*step_00000002/ledger\.jsonl"):
        open_newest(tmp_path)


def test_what_is_set_aside_neither_counts_nor_blocks_nor_goes(tmp_path: Path, mesh: Mesh) -> None:
    save_alone(tmp_path, mesh, 1)
    for _ in range(2):
        path, _ = save_alone(tmp_path, mesh, 2)
        set_aside(path)
    save_alone(tmp_path, mesh, 2)
    kept = ["damaged_step_00000002", "damaged_step_00000002.2"]
    assert names(tmp_path) == [*kept, "step_00000001", "step_00000002"]
    save_alone(tmp_path, mesh, 3)
    assert names(tmp_path) == [*kept, "step_00000002", "step_00000003"]


def test_the_live_parameters_need_twelve_bytes_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = directory.NewCheckpoint(tmp_path / "checkpoints", 1)
    free = 12 * 10**9
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    with pytest.raises(OSError, match=r"12,1[0-9,]+ bytes are needed and 12,000,000,000 free"):
        new.prepare(10**9)
    assert not new.scratch.exists()
    new.prepare(int(0.98e9))
    assert new.scratch.exists()


def test_several_shards_make_one_checkpoint(tmp_path: Path) -> None:
    path, states = save_split(tmp_path, pruned(2), 4, copies=3)
    checkpoint = Checkpoint(path)
    assert len(checkpoint.shard_names()) == 6
    for (name, kind), tensor in states.items():
        assert torch.equal(checkpoint.live(SPECS[name], kind), tensor)
