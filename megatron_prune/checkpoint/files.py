"""Small things that files of a checkpoint need: syncing, checksums, JSON from strangers, names that stay inside."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prune.errors import UserError

_DIGEST_BLOCK = 1 << 20


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is not what was written; an earlier checkpoint may be whole.

    Args:
        directory: of the checkpoint.
        file: name of the file in it.
        why: what is wrong with it.
    """

    def __init__(self, directory: Path, file: str, why: str) -> None:
        self.directory = directory
        self.file = file
        self.why = why
        super().__init__(f"checkpoint file {directory / file} {why}; restore it or use another checkpoint")


def write_synced(path: Path, text: str) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the disk has a directory's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(content: bytes) -> str:
    """Checksum in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """Checksum of a file in hexadecimal; reads it in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_DIGEST_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def regular_file(directory: Path, name: str) -> Path:
    """A file of a checkpoint directory: there, no link to elsewhere, and no pipe that reading would wait for.

    Raises:
        DamagedCheckpoint: it is missing or something else.
    """
    path = directory / name
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise DamagedCheckpoint(directory, name, f"is missing ({error.strerror})") from error
    if not stat.S_ISREG(mode):
        raise DamagedCheckpoint(directory, name, "is no regular file (links are not followed out of a checkpoint)")
    return path


def read_file(directory: Path, name: str, most: int) -> bytes:
    """The bytes of a small file of a checkpoint.

    Args:
        directory: of the checkpoint.
        name: of the file in it.
        most: bytes it may have; a larger one is not read.

    Raises:
        DamagedCheckpoint: it is missing, no regular file, too large, or cannot be read.
    """
    path = regular_file(directory, name)
    try:
        size = path.stat().st_size
        if size > most:
            raise DamagedCheckpoint(directory, name, f"has {size:,} bytes, more than the {most:,} it can have")
        return path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(directory, name, f"cannot be read ({error.strerror})") from error


def json_object(content: bytes) -> Mapping[str, Any]:
    """A JSON object from bytes that anyone may have written.

    Raises:
        ValueError: no UTF-8, no JSON, nested beyond reason, or no object.
    """
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} where an object belongs")
    return value


def whole_number(value: object, what: str, least: int = 0, most: int | None = None) -> int:
    """An integer from JSON within bounds; True is none.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{what} is {short(value)}, not a whole number {bounds}")
    return value


def short(value: object) -> str:
    """A value as an error line shows it: what a file holds may be long, or have line breaks."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
