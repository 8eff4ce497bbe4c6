"""What the tools have in common: how they end, and what they write."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from megatron_prune.errors import EXIT_BAD_INPUT, EXIT_FAILURE, MegatronPruneError, UserError

EXIT_INTERRUPTED = 130  # a shell's code for Ctrl-C
_OF_MODELS_AND_RUNS = (
    *("*.safetensors*", "*.bin", "config.json", "generation_config.json", "*token*.json", "tokenizer.model", "*.jinja"),
    *("vocab.json", "merges.txt", "metrics.jsonl", "ledger.jsonl", "config.yaml", "latency.json"),
)


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
    _check_writable(flag, file, "file")


def check_output_directory(flag: str, directory: Path) -> None:
    """Make what a directory to come will be in, and see that something can be written there.

    Args:
        flag: that names the directory, e.g. ``--save``.
        directory: to be written later.

    Raises:
        UserError: it is a file, or nothing can be written there.
    """
    if directory.is_file():
        raise UserError(f"{flag} {directory} is a file; name a directory")
    _check_writable(flag, directory, "directory")


def files_of(*directories: Path) -> list[Path]:
    """The files of models and runs, and of a run's exports, that a command reads: none may be what it writes."""
    places = [place for directory in directories for place in (directory, *directory.glob("exports/*"))]
    return [file for place in places for pattern in _OF_MODELS_AND_RUNS for file in place.glob(pattern)]


def beside(directory: Path, ending: str) -> Path:
    """Where what is made of a directory goes by default: ``runs/demo/export`` and ``.onnx`` give
    ``runs/demo/export.onnx``, and ``.`` the name that the directory has from outside."""
    named = directory if directory.name not in ("", "..") else directory.resolve()
    return named.parent / f"{named.name}{ending}"


@contextmanager
def written_at_once(output: Path) -> Iterator[Path]:
    """An empty directory beside an output, to write in: what is in it afterwards takes its place beside the output,
    and nothing does where the block fails. The output itself comes last, a directory of its name replaces an older one.

    Args:
        output: file or directory to come; the block gives the same name to what it writes.
    """
    parent = output.absolute().parent
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=parent) as name:
        scratch = Path(name)
        yield scratch
        for new in sorted(scratch.iterdir(), key=lambda entry: entry.name == output.name):
            old = parent / new.name
            if old.is_dir():
                old.rename(scratch / f"{new.name}.replaced")
            new.replace(old)


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Within, what libraries write to stderr in this process, bars of progress first, is dropped where that is no
    terminal: it would fill a log."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(sys.stderr if sys.stderr.isatty() else nowhere):
        yield


def _check_writable(flag: str, path: Path, kind: str) -> None:
    parent = path.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written ({error.strerror or error}); give another {kind}") from error
