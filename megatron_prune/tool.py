"""What the tools have in common: how they end, and files that they write at their end."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_prune.errors import EXIT_BAD_INPUT, EXIT_FAILURE, MegatronPruneError, UserError

EXIT_INTERRUPTED = 130  # a shell's code for Ctrl-C


def run_tool(action: Callable[[], int | None]) -> int:
    """Do what a tool does, with one line on stderr for what a user can meet.

    Args:
        action: returns an exit code, or None for 0.

    Returns:
        The exit code: the action's, 2 for bad input, 130 on Ctrl-C, 1 for other errors raised on purpose.
    """
    try:
        return action() or 0
    except MegatronPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILURE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def check_output(flag: str, file: Path | None, inputs: Iterable[Path] = ()) -> None:
    """Make the directory of a file to come, and see that it can be written and is none that is read.

    Args:
        flag: that names the file, e.g. ``--json``.
        file: to be written later; None where the flag was not given.
        inputs: files and directories that the command reads.

    Raises:
        UserError: it is a directory or an input, by whatever name, or nothing can be written there.
    """
    if file is None:
        return
    if file.is_dir():
        raise UserError(f"{flag} {file} is a directory; name a file in it")
    if os.path.realpath(file) in map(os.path.realpath, inputs):
        raise UserError(f"{flag} {file} is what this command reads; give another file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UserError(f"{flag} {file} cannot be written ({error.strerror or error}); give another file") from error
