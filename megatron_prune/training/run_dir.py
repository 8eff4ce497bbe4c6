"""The directory a run writes to: for one run at a time, and never half a file."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_prune.errors import UserError

LOCK_FILE = ".lock"
#: After which a lock is tried once more: :func:`lock_owner` holds it for a moment.
RETRY_SECONDS = 0.2


@contextlib.contextmanager
def locked(run_dir: Path | None) -> Iterator[None]:
    """Keep other runs out of a run directory for as long as this process lives, however it ends.

    Args:
        run_dir: made if missing; None locks nothing.

    Raises:
        UserError: another run has it, or it cannot be written.
    """
    if run_dir is None:
        yield
        return
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK_FILE).open("a+")
    with file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(RETRY_SECONDS)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = " ".join(file.read(200).split()) or "of unknown name"
            raise UserError(
                f"--save {run_dir} is in use by another run ({owner}); end that one, or give another --save"
            ) from error
        except OSError as error:
            note = f"note: {run_dir} cannot be locked ({error.strerror}); see that no other run writes there"
            print(note, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # the name is for users; a full disk is reported by what matters
            file.truncate(0)
            file.write(f"{socket.gethostname()}, pid {os.getpid()}")
            file.flush()
        yield


@dataclasses.dataclass(frozen=True)
class LockOwner:
    """Who has, or last had, a run directory.

    Attributes:
        name: host and process id, as :func:`locked` wrote them.
        held: whether a process has it now, as far as this machine can tell.
    """

    name: str
    held: bool


def lock_owner(run_dir: Path) -> LockOwner | None:
    """Who has, or last had, a run directory; None if nobody ever locked it or the file cannot be read."""
    try:
        with (run_dir / LOCK_FILE).open() as file:
            name = " ".join(file.read(200).split()) or "a process of unknown name"
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return LockOwner(name, held=True)
            return LockOwner(name, held=False)
    except (OSError, UnicodeDecodeError):
        return None


@contextlib.contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """What is written before training begins.

    Raises:
        UserError: it cannot be.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--save {run_dir} cannot be written ({error.strerror or error}); make room there, or give another --save"
        ) from error


def replace_text(path: Path, text: str) -> None:
    """Write a file under another name first: what was there stays until the new text is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
