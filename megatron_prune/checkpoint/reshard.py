"""Write a checkpoint for another layout, in one process, without DeepSpeed and without ever holding the model.

The file of a rank gets the live elements that this rank owns when it trains under the layout: its tensor-parallel
slots, its stage's layers, its share of the optimizer (:mod:`megatron_prune.parallel.fragments`; the division is the one
DeepSpeed 0.19 makes). Nothing hangs on that: any layout can load any checkpoint, the files only hold what is near.
Fragments are read and written one at a time, each from the runs of the old files that it needs, so memory is bounded by
a few times the largest tensor whatever the size of the model.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_prune.architecture import TensorSpec
from megatron_prune.checkpoint.cuts import kept_count, kept_values
from megatron_prune.checkpoint.directory import CHECKPOINTS, NewCheckpoint, step_directories
from megatron_prune.checkpoint.manifest import Manifest, shard_name
from megatron_prune.checkpoint.shards import ELEMENT_BYTES, Entry, write_shard
from megatron_prune.errors import UserError
from megatron_prune.parallel.fragments import Layout, Place, fragment_places
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.states import StateKind
from megatron_prune.pruning.ledger import Event

_MOST_PROCESSES = 1 << 17


class SavedStates(Protocol):
    """What a checkpoint holds, in whatever format it lies on disk."""

    @property
    def manifest(self) -> Manifest:
        """Everything but the tensors and the ledger."""

    @property
    def events(self) -> Sequence[Event]:
        """The ledger."""

    def specs(self) -> dict[str, TensorSpec]:
        """The model's tensors by logical name."""

    def kinds(self) -> tuple[StateKind, ...]:
        """The states that are stored."""

    def live(self, spec: TensorSpec, kind: StateKind = "master") -> Tensor:
        """The live fp32 tensor of one state."""

    def fragment(
        self, spec: TensorSpec, kind: StateKind, partition: Partition, tp_rank: int, start: int, numel: int
    ) -> Tensor:
        """A rank's fp32 fragment ``[numel]`` under any placement of the same live units, zero where a slot is dead."""


def no_report(_: int) -> None:
    """Nobody watches."""


def state_bytes(saved: SavedStates) -> int:
    """Size of all live states, which is what :func:`reshard` reports in total."""
    return ELEMENT_BYTES * len(saved.kinds()) * saved.manifest.partition.architecture().num_parameters()


def reshard(
    saved: SavedStates,
    run_dir: Path,
    layout: Layout,
    quantum: int,
    report: Callable[[int], None] = no_report,
) -> Path:
    """Write a checkpoint as the ranks of a layout would have saved it right after a compaction.

    The live units are dealt out afresh: all dead padding goes that the alignment does not need. States, ledger and
    counters are those of the source, bit for bit.

    Args:
        saved: what to write.
        run_dir: a new run directory; ``--load`` it, or copy its checkpoint into another.
        layout: to write for.
        quantum: alignment of ``stem`` and of a rank's ``ffn`` in channels (``--prune-align``).
        report: called with the bytes of every piece written.

    Returns:
        The finished directory.

    Raises:
        UserError: the run directory has checkpoints, there are more stages than layers, more tensor-parallel ranks
            than heads or more processes than anyone has, or the disk is full.
    """
    if layout.processes > _MOST_PROCESSES:
        raise UserError(f"{layout} is {layout.processes:,} processes: give sizes of {_MOST_PROCESSES:,} at most")
    if step_directories(run_dir):
        raise UserError(f"{run_dir} already holds checkpoints and nothing is overwritten; give a new directory")
    partition = spread_checked(saved.manifest.partition, layout.tensor, quantum)
    places: list[list[Place]] = [[] for _ in range(layout.processes)]
    for place in fragment_places(partition, layout):
        places[place.rank].append(place)
    settings = _settings_for(saved.manifest.settings, layout)
    manifest = dataclasses.replace(saved.manifest, partition=partition, settings=settings)
    new = NewCheckpoint(run_dir / CHECKPOINTS, manifest.progress.step)
    try:
        new.prepare(partition.architecture().num_parameters())
        digests = {}
        for rank, held in enumerate(places):
            name = shard_name(rank)
            entries = [_entry(saved, place, kind, partition, report) for place in held for kind in saved.kinds()]
            digests[name] = write_shard(new.scratch / name, entries, rank % layout.tensor)
        new.publish(manifest, saved.events, digests)
    except OSError as error:
        new.abandon()
        raise UserError(f"cannot write {new.final}: {error.strerror or error}") from error
    except BaseException:
        new.abandon()
        raise
    return new.final


def spread_checked(partition: Partition, tensor_parallel: int, quantum: int) -> Partition:
    """The live units dealt out afresh.

    Raises:
        UserError: there are fewer heads than ranks.
    """
    heads = partition.architecture().num_attention_heads
    if tensor_parallel > heads:
        flag = f"--tensor-model-parallel-size {tensor_parallel}"
        raise UserError(f"{flag} is above the {heads} heads that are left: use at most that")
    return partition.spread(tensor_parallel, quantum)


def copy_run_files(run_dir: Path, target: Path, names: Sequence[str]) -> None:
    """Give a new run directory what a run keeps beside its checkpoints, where it is there."""
    for name in names:
        if (run_dir / name).is_dir():
            shutil.copytree(run_dir / name, target / name, dirs_exist_ok=True)


def _entry(
    saved: SavedStates, place: Place, kind: StateKind, partition: Partition, report: Callable[[int], None]
) -> Entry:
    spec, tp_rank, start, numel = place.spec, place.tp_rank, place.start, place.numel
    kept = kept_count(spec, partition, tp_rank, start, numel)

    def values() -> Tensor:
        if not kept:  # another rank is the keeper
            return torch.empty(0)
        fragment = saved.fragment(spec, kind, partition, tp_rank, start, numel)
        report(ELEMENT_BYTES * kept)
        return kept_values(fragment, spec, partition, tp_rank, start)

    return Entry(f"{kind}/{spec.name}", start, numel, kept, values)


def _settings_for(settings: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The run's settings with the sizes that the files are written for, where they are recorded."""
    sizes = {"tensor_model_parallel_size": layout.tensor, "pipeline_model_parallel_size": layout.pipeline}
    return {**settings, "parallel": {**settings.get("parallel", {}), **sizes}}
