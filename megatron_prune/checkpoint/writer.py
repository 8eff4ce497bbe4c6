"""Saving: every rank writes its shard, the main process the rest. In the foreground, or behind the next steps.

What a rank cannot write is no checkpoint for any: the ranks exchange how they fared, and either all have the finished
directory or all raise :class:`SaveError` and the older checkpoints stay as they were.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_prune.checkpoint.cuts import kept_count, kept_values
from megatron_prune.checkpoint.directory import CHECKPOINTS, NewCheckpoint, remove_all
from megatron_prune.checkpoint.manifest import Manifest, shard_name
from megatron_prune.checkpoint.shards import Entry, write_shard
from megatron_prune.errors import MegatronPruneError
from megatron_prune.parallel.collectives import from_main, gather, largest
from megatron_prune.parallel.mesh import Mesh
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.states import StateFragment
from megatron_prune.pruning.ledger import Event


class SaveError(MegatronPruneError):
    """A checkpoint could not be written; nothing of it is left and the earlier ones are untouched."""


def save_checkpoint(
    run_dir: Path,
    manifest: Manifest,
    events: Sequence[Event],
    fragments: Iterable[StateFragment],
    mesh: Mesh,
    keep_last: int,
) -> Path:
    """Write one checkpoint; a collective of all ranks.

    Args:
        run_dir: the run directory, shared by all ranks.
        manifest: everything but the checksums.
        events: the ledger so far.
        fragments: this rank's states.
        mesh: groups.
        keep_last: older complete checkpoints beyond this number are deleted afterwards.

    Returns:
        The finished directory.

    Raises:
        SaveError: on every rank, when any of them could not write, e.g. because the disk is full.
    """
    save = _Save(run_dir, manifest, events, mesh, keep_last)
    outcome = save.write(fragments)
    remove_all(save.finish(outcome))
    return save.path


class HostMemory:
    """Where background saves, one after the other, copy states to; pinned if they come from a GPU.

    It is kept from one save to the next: a new page costs more time than what is copied into it.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def copy(self, fragments: Iterable[StateFragment]) -> list[StateFragment]:
        """Copies of fp32 fragments, good until the next call. Raises MemoryError where there is no room.

        They are copied as they lie, dead padding too: to pick the live elements takes several times as long, and the
        thread that writes them has that time.
        """
        sources = list(fragments)
        needed = sum(fragment.values.numel() for fragment in sources)
        if needed > self._memory.numel():
            on_gpu = any(fragment.values.is_cuda for fragment in sources)
            self._memory = torch.empty(0)  # the old one goes first
            try:
                self._memory = torch.empty(needed, dtype=torch.float32, pin_memory=on_gpu)
            except RuntimeError as error:  # of the allocator, or of the driver that pins
                raise MemoryError(f"{4 * needed:,} bytes of host memory cannot be had") from error
        copies, start = [], 0
        for fragment in sources:
            place = self._memory[start : start + fragment.values.numel()]
            place.copy_(fragment.values.detach(), non_blocking=True)
            copies.append(dataclasses.replace(fragment, values=place))
            start += len(place)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


class BackgroundSave:
    """A checkpoint whose shards a thread writes from a copy in host memory while training goes on.

    Attributes:
        progress: what the checkpoint holds.
        deleting: the thread that deletes what :meth:`finish` retired, on the main process; a run waits for it at its
            end.

    All methods are collectives of all ranks, called on the thread that trains: the writing thread communicates with
    nobody. What is written is what :func:`save_checkpoint` would have written, byte for byte.

    Args:
        run_dir: the run directory, shared by all ranks.
        manifest: everything but the checksums.
        events: the ledger so far; copied.
        fragments: this rank's states; copied before this returns (12 bytes of host memory per element of its share).
        mesh: groups.
        keep_last: older complete checkpoints beyond this number are deleted afterwards.
        memory: to copy to; no other save may be using it. None takes new memory.

    Raises:
        SaveError: on every rank, when the directory cannot be made, or the disk or the memory of a host has no room.
    """

    def __init__(
        self,
        run_dir: Path,
        manifest: Manifest,
        events: Sequence[Event],
        fragments: Iterable[StateFragment],
        mesh: Mesh,
        keep_last: int,
        memory: HostMemory | None = None,
    ) -> None:
        self.progress = manifest.progress
        self._mesh = mesh
        self._save = _Save(run_dir, manifest, list(events), mesh, keep_last)
        self._outcome = _Outcome(error="the writing thread ended without a word")
        self.deleting: threading.Thread | None = None
        copies, error = [], None
        try:
            copies = (memory or HostMemory()).copy(fragments)
        except MemoryError as problem:
            error = f"rank {mesh.rank}: {problem}"
        self._save.agree(error)
        # A daemon: a run that dies of something else must not wait for a disk.
        self._thread = threading.Thread(target=self._write, args=(copies,), name="checkpoint", daemon=True)
        self._thread.start()

    def written(self) -> bool:
        """True when every rank's thread is done, so that :meth:`finish` waits for nothing."""
        return not largest(int(self._thread.is_alive()), self._mesh)

    def finish(self) -> Path:
        """Wait for the threads and make the checkpoint complete.

        Returns:
            The finished directory.

        Raises:
            SaveError: on every rank, when any of them could not write.
        """
        self._thread.join()
        retired = self._save.finish(self._outcome)
        if retired:  # deleting takes time too
            self.deleting = threading.Thread(
                target=remove_all, args=(retired,), name="retired checkpoints", daemon=True
            )
            self.deleting.start()
        return self._save.path

    def _write(self, copies: Sequence[StateFragment]) -> None:
        self._outcome = self._save.write(copies)


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """How a rank's writing went: the shard's name and checksum, or what prevented it."""

    name: str = ""
    digest: str = ""
    error: str | None = None


class _Save:
    """The three parts of a save. The first and the last are collectives of all ranks."""

    def __init__(self, run_dir: Path, manifest: Manifest, events: Sequence[Event], mesh: Mesh, keep_last: int) -> None:
        self._manifest = manifest
        self._events = events
        self._mesh = mesh
        self._keep_last = keep_last
        self._new = NewCheckpoint(run_dir / CHECKPOINTS, manifest.progress.step)
        error = None
        if mesh.is_main:
            try:
                self._new.prepare(manifest.partition.architecture().num_parameters())
            except OSError as problem:
                error = _reason(problem)
        self._raise(from_main(error, mesh))

    @property
    def path(self) -> Path:
        """Where the checkpoint is in the end."""
        return self._new.final

    def write(self, fragments: Iterable[StateFragment]) -> _Outcome:
        """Write this rank's shard."""
        name = shard_name(self._mesh.rank)
        entries = [_entry(fragment, self._manifest.partition, self._mesh.tp_rank) for fragment in fragments]
        try:
            return _Outcome(name, write_shard(self._new.scratch / name, entries, self._mesh.tp_rank))
        except OSError as problem:
            return _Outcome(error=f"{name}: {_reason(problem)}")

    def agree(self, error: str | None) -> None:
        """Give up on every rank if any of them has an error."""
        first = next((other for other in gather(error, self._mesh) if other is not None), None)
        if first is not None and self._mesh.is_main:
            self._new.abandon()
        self._raise(first)

    def finish(self, outcome: _Outcome) -> list[Path]:
        """Complete the checkpoint if every rank has written its shard; returns what is to be deleted now."""
        outcomes: list[_Outcome] = gather(outcome, self._mesh)
        error = next((other.error for other in outcomes if other.error is not None), None)
        retired: list[Path] = []
        if self._mesh.is_main:
            try:
                if error is None:
                    self._new.publish(self._manifest, self._events, {one.name: one.digest for one in outcomes})
                    retired = self._new.retire(self._keep_last)
            except OSError as problem:
                error = _reason(problem)
            if error is not None:
                self._new.abandon()
        self._raise(from_main(error, self._mesh))
        return retired

    def _raise(self, error: str | None) -> None:
        if error is not None:
            raise SaveError(
                f"checkpoint {self.path} could not be written ({error}); earlier checkpoints are untouched, make room "
                "or give another --save"
            )


def _entry(fragment: StateFragment, partition: Partition, tp_rank: int) -> Entry:
    spec, start, values = fragment.spec, fragment.start, fragment.values.detach()
    kept = kept_count(spec, partition, tp_rank, start, values.numel())

    def cut() -> Tensor:
        return kept_values(values, spec, partition, tp_rank, start).cpu()

    return Entry(f"{fragment.kind}/{spec.name}", start, values.numel(), kept, cut)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
