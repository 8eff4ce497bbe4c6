"""The directory a run writes to: for one run at a time, and never half a file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_prune.errors import UserError

LOCK_FILE = ".lock"


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
