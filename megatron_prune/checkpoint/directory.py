"""Checkpoint directories: which there are, and how one comes to be whole, replaces another or is put aside.

``checkpoints/step_00000100`` is written as ``.writing_step_00000100`` and renamed when it is whole; what is to go gets
a hidden name first. So whatever has the name of a step was whole once, and a process may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_prune.checkpoint.files import sha256_file, sync_directory, write_synced
from megatron_prune.checkpoint.manifest import COMPLETE_FILE, LEDGER_FILE, MANIFEST_FILE, Manifest, complete_text
from megatron_prune.pruning.ledger import Event, Ledger

CHECKPOINTS = "checkpoints"
#: Of the run directory: what exports need of the source (config, tokenizer), so that a run stands alone.
SOURCE_DIR = "source"
#: The second form exists between the two renames that replace a step by itself.
_NAME = re.compile(r"step_(\d{8,})(\.replaced)?")
_REPLACED = ".replaced"
_WRITING, _REMOVING = ".writing_", ".removing_"
_DAMAGED = "damaged_"

BYTES_PER_PARAMETER = 12  # fp32 master and two moments
_SLACK_SHARE = 0.01  # headers, manifest and ledger, of the tensors' size
_SLACK_BYTES = 1 << 20


def named_step(path: Path) -> int | None:
    """The step that a directory's name says, or None if it has not the name of a step."""
    match = _NAME.fullmatch(path.name)
    return None if match is None else int(match[1])


def step_of(path: Path) -> int:
    """The step that a step's directory is named after."""
    step = named_step(path)
    assert step is not None, path
    return step


def step_directories(run_dir: Path) -> list[Path]:
    """Everything with the name of a step, oldest first, whole or not. A link is no step, wherever it leads."""
    named = (path for path in (run_dir / CHECKPOINTS).glob("step_*") if named_step(path) is not None)
    found = [path for path in named if path.is_dir() and not path.is_symlink()]
    names = {path.name for path in found}
    current = [path for path in found if path.name.removesuffix(_REPLACED) == path.name or _own_name(path) not in names]
    return sorted(current, key=step_of)


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run that are marked complete, oldest first."""
    return [path for path in step_directories(run_dir) if (path / COMPLETE_FILE).exists()]


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint marked complete, or None."""
    complete = complete_checkpoints(run_dir)
    return complete[-1] if complete else None


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that its step can be saved again and it is not taken for one of the last whole
    ones; it is never deleted. Returns its new place."""
    places = (path.parent / f"{_DAMAGED}{path.name}{suffix}" for suffix in ("", *(f".{n}" for n in range(2, 1000))))
    place = next(place for place in places if not place.exists())
    path.rename(place)
    sync_directory(path.parent)
    return place


def damaged_directories(run_dir: Path) -> list[Path]:
    """What :func:`set_aside` has renamed."""
    return sorted((run_dir / CHECKPOINTS).glob(f"{_DAMAGED}*"))


class NewCheckpoint:
    """A checkpoint on its way; all methods are for one process, the main one of a run.

    Args:
        root: directory of checkpoints.
        step: the step it is of.
    """

    def __init__(self, root: Path, step: int) -> None:
        name = f"step_{step:08d}"
        self.root = root
        self.scratch = root / f"{_WRITING}{name}"
        self.final = root / name

    def prepare(self, parameters: int) -> None:
        """Remove what killed processes left, make the temporary directory and look whether the disk has room.

        Args:
            parameters: of the live model.

        Raises:
            OSError: the directory cannot be made, or the disk has no room.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        for replaced in self.root.glob(f"step_*{_REPLACED}"):
            if (self.root / _own_name(replaced) / COMPLETE_FILE).exists():
                self._hidden(replaced)
        remove_all([path for prefix in (_WRITING, _REMOVING) for path in self.root.glob(f"{prefix}*")])
        needed = int(BYTES_PER_PARAMETER * parameters * (1 + _SLACK_SHARE)) + _SLACK_BYTES
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise OSError(f"{needed:,} bytes are needed and {free:,} free in {self.root}; free some")
        self.scratch.mkdir()

    def publish(self, manifest: Manifest, events: Sequence[Event], shards: Mapping[str, str]) -> None:
        """Add ledger, manifest and marker to the shards, and give the directory its name.

        Args:
            manifest: everything but the checksums.
            events: the ledger.
            shards: file name to sha256; the files are there and synced.

        Raises:
            OSError: the disk is full, say.
        """
        Ledger(self.scratch / LEDGER_FILE).restore(list(events))
        ledger = sha256_file(self.scratch / LEDGER_FILE)
        text = Manifest(
            manifest.partition,
            manifest.progress,
            manifest.settings,
            manifest.data_fingerprint,
            dict(shards),
            ledger,
        ).to_json()
        write_synced(self.scratch / MANIFEST_FILE, text)
        write_synced(self.scratch / COMPLETE_FILE, complete_text(text))
        sync_directory(self.scratch)
        replaced = self.root / f"{self.final.name}{_REPLACED}"
        if os.path.lexists(self.final):
            # The same step again; until the second rename, readers take it under the other name.
            self.final.rename(replaced)
        self.scratch.rename(self.final)
        sync_directory(self.root)
        if os.path.lexists(replaced):
            remove_all([self._hidden(replaced)])

    def retire(self, keep_last: int) -> list[Path]:
        """Take their names from complete checkpoints beyond the last ones; returns what is left to be deleted.

        Later steps do not count: the run went back past them, and must not lose what it saves for them.
        """
        complete = complete_checkpoints(self.root.parent)
        until_now = [path for path in complete if step_of(path) <= step_of(self.final)]
        return [self._hidden(old) for old in until_now[:-keep_last]]

    def abandon(self) -> None:
        """Remove what was written."""
        remove_all([self.scratch])

    def _hidden(self, path: Path) -> Path:
        """Rename what is to be deleted: a half-deleted checkpoint must not have the name of a step."""
        place = self.root / f"{_REMOVING}{path.name}"
        path.rename(place)
        return place


def remove_all(paths: Sequence[Path]) -> None:
    """Delete directories that have given up their names.

    What cannot be deleted now, or is being deleted by another thread, goes before the next checkpoint is written.
    """
    for path in paths:
        if path.is_symlink():  # which rmtree refuses
            with contextlib.suppress(OSError):
                path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def _own_name(replaced: Path) -> str:
    return replaced.name.removesuffix(_REPLACED)
