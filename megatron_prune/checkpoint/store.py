"""Checkpoints: one directory per step with a manifest, the ledger and one shard per rank.

A shard holds, for every fragment its rank owns, the *live* elements it is the keeper of: of the fp32 master and of both
moments, under the logical name; dead padding is rebuilt from the manifest's placement. The directory is written under
a temporary name, synced, marked ``COMPLETE`` and renamed, so what has the final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_prune.architecture import TensorSpec, tensor_specs
from megatron_prune.checkpoint.manifest import MANIFEST_FILE, Manifest
from megatron_prune.errors import UserError
from megatron_prune.parallel.collectives import barrier, gather
from megatron_prune.parallel.mesh import Mesh
from megatron_prune.parallel.placement import deposit_, kept_mask
from megatron_prune.parallel.states import StateFragment, StateKind
from megatron_prune.pruning.ledger import Event, Ledger, read_ledger

CHECKPOINTS = "checkpoints"
COMPLETE_FILE = "COMPLETE"
LEDGER_FILE = "ledger.jsonl"
#: Of the run directory: what exports need of the source (config, tokenizer), so that a run stands alone.
SOURCE_DIR = "source"
_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".writing_"
_DIGEST_BLOCK = 1 << 20


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
        manifest: everything but the shard checksums.
        events: the ledger so far.
        fragments: this rank's states.
        mesh: groups.
        keep_last: older complete checkpoints beyond this number are deleted afterwards.

    Returns:
        The finished directory.
    """
    root = run_dir / CHECKPOINTS
    name = f"step_{manifest.progress.step:08d}"
    scratch, final = root / f"{_TEMPORARY}{name}", root / name
    if mesh.is_main:
        for stale in root.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(stale)
        scratch.mkdir(parents=True)
    barrier(mesh)
    shard = scratch / f"rank_{mesh.rank:05d}.safetensors"
    _write_shard(shard, manifest, fragments, mesh.tp_rank)
    shards = dict(gather((shard.name, _sha256(shard)), mesh))
    if mesh.is_main:
        Ledger(scratch / LEDGER_FILE).restore(list(events))
        complete = Manifest(manifest.partition, manifest.progress, manifest.settings, manifest.data_fingerprint, shards)
        _write_synced(scratch / MANIFEST_FILE, complete.to_json())
        _write_synced(scratch / COMPLETE_FILE, "")
        _sync_directory(scratch)
        if final.exists():  # the same step again, e.g. a stop right after an interval
            shutil.rmtree(final)
        scratch.rename(final)
        _sync_directory(root)
        for old in complete_checkpoints(run_dir)[:-keep_last]:
            shutil.rmtree(old)
    barrier(mesh)
    return final


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in (run_dir / CHECKPOINTS).glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / COMPLETE_FILE).exists()), key=lambda path: int(path.name[5:]))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    complete = complete_checkpoints(run_dir)
    return complete[-1] if complete else None


class Checkpoint:
    """A complete checkpoint opened for reading; any number of processes may read it.

    Args:
        path: its directory.

    Raises:
        UserError: a shard is missing or its checksum is wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = Manifest.read(path)
        self.events = read_ledger(path / LEDGER_FILE)
        self._shards = [path / name for name in self.manifest.shards]
        for shard in self._shards:
            if not shard.exists() or _sha256(shard) != self.manifest.shards[shard.name]:
                state = "damaged" if shard.exists() else "missing"
                raise UserError(f"checkpoint shard {shard} is {state}; delete {path} to resume from the one before")

    def live(self, spec: TensorSpec, kind: StateKind = "master") -> Tensor:
        """The live (logical) fp32 tensor of one state: what an export holds and any layout can start from.

        Raises:
            UserError: the shards do not hold all of it.
        """
        partition = self.manifest.partition
        whole = torch.zeros(partition.logical_shape(spec), dtype=torch.float32)
        missing = whole.numel()
        for values, tp_rank, start, numel in self._pieces(f"{kind}/{spec.name}"):
            fragment = torch.zeros(numel, dtype=torch.float32)
            fragment[kept_mask(spec, partition, tp_rank, start, numel)] = values
            deposit_(whole, fragment, spec, partition, tp_rank, start)
            missing -= values.numel()
        if missing:
            raise UserError(f"checkpoint {self.path} lacks {missing} elements of {spec.name}; use another checkpoint")
        return whole

    def specs(self) -> dict[str, TensorSpec]:
        """The model's tensors by logical name."""
        return {spec.name: spec for spec in tensor_specs(self.manifest.partition.source)}

    def _pieces(self, key: str) -> Iterable[tuple[Tensor, int, int, int]]:
        """Kept values, tensor-parallel rank, start and length of every shard's fragment."""
        for shard in self._shards:
            try:
                with safe_open(shard, framework="pt") as file:
                    metadata = file.metadata()
                    places: dict[str, list[int]] = json.loads(metadata["fragments"])
                    if key in places:
                        start, numel = places[key]
                        yield file.get_tensor(key), int(metadata["tp_rank"]), start, numel
            except (SafetensorError, KeyError, ValueError) as error:
                raise UserError(f"checkpoint shard {shard} cannot be read ({error})") from error


def _write_shard(path: Path, manifest: Manifest, fragments: Iterable[StateFragment], tp_rank: int) -> None:
    tensors: dict[str, Tensor] = {}
    places: dict[str, list[int]] = {}
    for fragment in fragments:
        key = f"{fragment.kind}/{fragment.spec.name}"
        mask = kept_mask(fragment.spec, manifest.partition, tp_rank, fragment.start, fragment.values.numel())
        tensors[key] = fragment.values.detach().cpu()[mask].clone()
        places[key] = [fragment.start, fragment.values.numel()]
    save_file(tensors, path, metadata={"fragments": json.dumps(places), "tp_rank": str(tp_rank)})
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_DIGEST_BLOCK):
            digest.update(block)
    return digest.hexdigest()
