"""One run at a time in a directory, and no half-written file in it."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.errors import UserError
from megatron_prune.training.run_dir import lock_owner, locked, replace_text, writing


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with locked(run_dir), pytest.raises(UserError, match=rf"--save {run_dir} .*pid {os.getpid()}\)"), locked(run_dir):
        pytest.fail("two runs at once")
    with locked(run_dir):
        assert [path.name for path in run_dir.iterdir()] == [".lock"]


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=lock_and_die, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == 9
    with locked(tmp_path):
        pass


def lock_and_die(run_dir: Path) -> None:
    with locked(run_dir):
        os._exit(9)


def test_a_file_system_without_locks_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path):
        assert capsys.readouterr().err.startswith(f"note: {tmp_path} cannot be locked")


def test_who_has_it(tmp_path: Path) -> None:
    assert lock_owner(tmp_path) is None
    with locked(tmp_path):
        owner = lock_owner(tmp_path)
        assert owner is not None
        assert owner.held
        assert owner.name.endswith(f", pid {os.getpid()}")
    owner = lock_owner(tmp_path)
    assert owner is not None
    assert not owner.held


def test_a_look_at_that_moment_refuses_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / ".lock").open("w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN))
        with locked(tmp_path):
            assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_no_directory_has_no_lock() -> None:
    with locked(None):
        pass


def test_a_full_disk_at_the_start_is_one_line(tmp_path: Path) -> None:
    message = rf"--save {tmp_path} cannot be written \(No space left on device\)"
    with pytest.raises(UserError, match=message), writing(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    replace_text(path, "old")

    def full(place: Path, text: str) -> int:
        place.write_bytes(text[:1].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(path, "new")
    assert [each.name for each in tmp_path.iterdir()] == ["config.yaml"]
    assert path.read_text() == "old"
