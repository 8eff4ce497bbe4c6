"""Checkpoints of a few kilobytes for the tests of this directory, with as many shards as wanted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.architecture import Architecture, TensorSpec, tensor_specs, uniform_kv_groups
from megatron_prune.checkpoint.cuts import kept_count, kept_values
from megatron_prune.checkpoint.files import sha256_file
from megatron_prune.checkpoint.manifest import (
    COMPLETE_FILE,
    MANIFEST_FILE,
    Manifest,
    Progress,
    complete_text,
    shard_name,
)
from megatron_prune.checkpoint.shards import Entry, write_shard
from megatron_prune.checkpoint.store import CHECKPOINTS, NewCheckpoint, save_checkpoint
from megatron_prune.parallel.mesh import Mesh, make_mesh
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.placement import place, take
from megatron_prune.parallel.states import STATE_KINDS, StateFragment, StateKind
from megatron_prune.pruning.groups import MiniGroup, remove
from megatron_prune.pruning.ledger import Event

ARCH = Architecture("llama", 2, 6, 10, 4, uniform_kv_groups(2, 4, 2), 4, 9)
SPECS = {spec.name: spec for spec in tensor_specs(ARCH)}

States = dict[tuple[str, StateKind], Tensor]


def event(step: int) -> Event:
    """The removal of one stem channel."""
    return Event(1, step, 10 * step, "stem", 2, {"stem": 0.5}, {"hidden_size": 5}, 100)


def alone(directory: Path) -> Mesh:
    """A process group of one; the caller destroys it."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=0, world_size=1)
    return make_mesh(torch.device("cpu"))


def pruned(tensor_parallel: int = 1) -> Partition:
    """The source without stem channel 2, its slot still there."""
    return remove(Partition.of(ARCH, tensor_parallel), MiniGroup("stem", 2))


def logical_states(partition: Partition, seed: int = 0) -> States:
    """Random live tensors of every state."""
    draw = torch.Generator().manual_seed(seed)
    return {
        (name, kind): torch.randn(partition.logical_shape(spec), generator=draw)
        for name, spec in SPECS.items()
        for kind in STATE_KINDS
    }


def manifest_of(partition: Partition, step: int) -> Manifest:
    """What a run would say of itself."""
    progress = Progress(step=step, adam_steps=step, events=1, exported=("1K",))
    return Manifest(partition, progress, {"optim": {"lr": 1.0}}, "data", {})


def fragments_of(states: States, partition: Partition) -> list[StateFragment]:
    """The states as a single process holds them."""
    return [
        StateFragment(SPECS[name], kind, 0, place(tensor, SPECS[name], partition).flatten())
        for (name, kind), tensor in states.items()
    ]


def save_alone(run_dir: Path, mesh: Mesh, step: int, keep_last: int = 2) -> tuple[Path, States]:
    """Save as a run of one process does; every step has other values."""
    partition = pruned()
    states = logical_states(partition, step)
    fragments = fragments_of(states, partition)
    path = save_checkpoint(run_dir, manifest_of(partition, step), [event(step)], fragments, mesh, keep_last)
    return path, states


def save_split(run_dir: Path, partition: Partition, step: int, copies: int = 1) -> tuple[Path, States]:
    """Save as the ranks of a tensor-parallel run would, the optimizer divided over copies as ZeRO-1 does."""
    states = logical_states(partition, step)
    new = NewCheckpoint(run_dir / CHECKPOINTS, step)
    new.prepare(0)
    digests = {}
    for copy in range(copies):
        for tp_rank in range(partition.tensor_parallel):
            name = shard_name(copy * partition.tensor_parallel + tp_rank)
            entries = [
                _entry(tensor, SPECS[key], kind, partition, tp_rank, (copy, copies))
                for (key, kind), tensor in states.items()
            ]
            digests[name] = write_shard(new.scratch / name, entries, tp_rank)
    new.publish(manifest_of(partition, step), [event(step)], digests)
    return new.final, states


def _entry(
    tensor: Tensor, spec: TensorSpec, kind: StateKind, partition: Partition, tp_rank: int, share: tuple[int, int]
) -> Entry:
    numel = torch.Size(partition.shape(spec, tp_rank)).numel()
    start, stop = numel * share[0] // share[1], numel * (share[0] + 1) // share[1]
    fragment = take(tensor, spec, partition, tp_rank, start, stop - start)
    kept = kept_count(spec, partition, tp_rank, start, stop - start)
    values = kept_values(fragment, spec, partition, tp_rank, start)
    return Entry(f"{kind}/{spec.name}", start, stop - start, kept, lambda: values)


def sign(path: Path, content: dict[str, Any]) -> None:
    """Write a manifest with the checksums of what is in the directory: wrong only in what it says."""
    text = json.dumps(content)
    (path / MANIFEST_FILE).write_text(text)
    (path / COMPLETE_FILE).write_text(complete_text(text))


def sign_shards(path: Path) -> None:
    """Renew the manifest's checksums of the shards."""
    content = json.loads((path / MANIFEST_FILE).read_text())
    content["shards"] = {name: sha256_file(path / name) for name in content["shards"]}
    sign(path, content)


def with_progress(manifest: Manifest, **changes: Any) -> Manifest:
    """The same manifest with other counters."""
    return dataclasses.replace(manifest, progress=dataclasses.replace(manifest.progress, **changes))
