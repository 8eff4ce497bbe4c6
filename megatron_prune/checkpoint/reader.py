"""Reading: an index of all shards' headers, then only those runs of them that somebody needs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megatron_prune.architecture import TensorSpec, tensor_specs
from megatron_prune.checkpoint.cuts import kept_count, read_window, take_from, window_of
from megatron_prune.checkpoint.directory import named_step, step_directories, step_of
from megatron_prune.checkpoint.files import DamagedCheckpoint, regular_file, sha256_file, short
from megatron_prune.checkpoint.manifest import MANIFEST_FILE, Manifest
from megatron_prune.checkpoint.shards import Piece, read_header
from megatron_prune.errors import UserError
from megatron_prune.parallel.collectives import gather
from megatron_prune.parallel.mesh import Mesh
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.states import MOMENTS, STATE_KINDS, StateKind

#: How an error begins that says nothing of a file's content; :func:`read_file` has the same words.
_UNREADABLE = "cannot be read"


class Checkpoint:
    """A complete checkpoint opened for reading; any number of processes may read it.

    Opening reads the manifest and the ledger, with their checksums, and the header of every shard, whose sizes must be
    those of the architecture. No tensor is read or allocated until it is asked for.

    Args:
        path: its directory.
        verify: take the checksum of every shard now. The processes of a run share that work instead: see
            :func:`verify_together`.

    Raises:
        DamagedCheckpoint: a file is missing, damaged or contradicts another; the file is named.
        UserError: it is of another format version.
    """

    def __init__(self, path: Path, verify: bool = True) -> None:
        self.path = path
        self.manifest = Manifest.read(path)
        step = self.manifest.progress.step
        if named_step(path) not in (step, None):
            raise DamagedCheckpoint(path, MANIFEST_FILE, f"is of step {step}, not of the directory's")
        self.events = self.manifest.read_ledger(path)
        self._specs = {spec.name: spec for spec in tensor_specs(self.manifest.partition.source)}
        self._pieces = self._index()
        if verify:
            damage = self.damage(self.shard_names())
            if damage is not None:
                raise DamagedCheckpoint(path, *damage)

    def shard_names(self) -> list[str]:
        """File names of the shards, in rank order."""
        return sorted(self.manifest.shards, key=lambda name: (len(name), name))

    def damage(self, names: Sequence[str]) -> tuple[str, str] | None:
        """Take the checksums of shards; the first that is wrong, with what is wrong, or None."""
        for name in names:
            why = shard_damage(self.path, name, self.manifest.shards[name])
            if why is not None:
                return name, why
        return None

    def specs(self) -> dict[str, TensorSpec]:
        """The model's tensors by logical name."""
        return dict(self._specs)

    def kinds(self) -> tuple[StateKind, ...]:
        """The states that are stored: masters, and moments unless no step has been applied."""
        return tuple(kind for kind in STATE_KINDS if f"{kind}/{next(iter(self._specs))}" in self._pieces)

    def live(self, spec: TensorSpec, kind: StateKind = "master") -> Tensor:
        """The live (logical) fp32 tensor of one state: what an export holds and any layout can start from.

        Raises:
            UserError: the checkpoint has no such state.
            DamagedCheckpoint: a shard cannot be read.
        """
        shape = self.manifest.partition.logical_shape(spec)
        rows, columns = range(shape[0]), range(shape[1] if len(shape) == 2 else 1)
        try:
            window, _ = read_window(spec, self.manifest.partition, self._stored(spec, kind), rows, columns)
        except OSError as error:
            raise self._unreadable(error) from error
        return window.values.view(shape)

    def fragment(
        self, spec: TensorSpec, kind: StateKind, partition: Partition, tp_rank: int, start: int, numel: int
    ) -> Tensor:
        """A rank's fragment under any placement of the same live units; reads and holds little more than it needs.

        Args:
            spec: the tensor.
            kind: its state.
            partition: where units go now.
            tp_rank: whose physical tensor.
            start: first element of the fragment in the flattened physical tensor.
            numel: length of the fragment.

        Returns:
            fp32 ``[numel]``, zero where a slot is dead: what ``take`` cuts out of :meth:`live`.

        Raises:
            UserError: the checkpoint has no such state.
            DamagedCheckpoint: a shard cannot be read.
        """
        saved = self.manifest.partition
        assert partition.logical_shape(spec) == saved.logical_shape(spec), "another model"
        window_rows, window_columns = window_of(spec, partition, tp_rank, start, numel)
        try:
            window, _ = read_window(spec, saved, self._stored(spec, kind), window_rows, window_columns)
        except OSError as error:
            raise self._unreadable(error) from error
        return take_from(window, spec, partition, tp_rank, start, numel)

    def _stored(self, spec: TensorSpec, kind: StateKind) -> list[Piece]:
        pieces = self._pieces.get(f"{kind}/{spec.name}")
        if pieces is None:
            raise UserError(f"checkpoint {self.path} holds no {kind} of {spec.name}; use another checkpoint")
        return pieces

    def _unreadable(self, error: OSError) -> DamagedCheckpoint:
        name = Path(error.filename).name if error.filename else MANIFEST_FILE
        return DamagedCheckpoint(self.path, name, f"{_UNREADABLE} ({error.strerror or error})")

    # -- index ------------------------------------------------------------------------------------------------------

    def _index(self) -> dict[str, list[Piece]]:
        pieces: dict[str, list[Piece]] = {}
        sizes: dict[str, int] = {}
        for name in self.shard_names():
            try:
                for key, piece in read_header(regular_file(self.path, name)).items():
                    pieces.setdefault(key, []).append(piece)
                    sizes[key] = sizes.get(key, 0) + piece.kept
            except OSError as error:
                raise DamagedCheckpoint(self.path, name, f"{_UNREADABLE} ({error.strerror or error})") from error
            except ValueError as error:
                raise DamagedCheckpoint(self.path, name, f"is damaged ({error})") from error
        try:
            self._check_sizes(sizes)
            for key, stored in pieces.items():
                self._check_pieces(self._specs[key.partition("/")[2]], stored)
        except ValueError as error:
            raise DamagedCheckpoint(self.path, MANIFEST_FILE, f"does not fit its shards ({error})") from error
        return pieces

    def _check_sizes(self, sizes: dict[str, int]) -> None:
        """The shards hold every element of the architecture's tensors; the totals first, which allocate nothing.

        Raises:
            ValueError: they do not.
        """
        partition = self.manifest.partition
        expected = partition.architecture().num_parameters()
        for kind in STATE_KINDS:
            stored = sum(size for key, size in sizes.items() if key.startswith(f"{kind}/"))
            optional = kind in MOMENTS and not self.manifest.progress.adam_steps
            if stored != expected and not (optional and not stored):
                raise ValueError(f"{stored} elements of {kind} are stored, the architecture has {expected}")
        known = {f"{kind}/{name}" for kind in STATE_KINDS for name in self._specs}
        unknown = sizes.keys() - known
        if unknown:
            raise ValueError(f"no tensor of the architecture is {short(min(unknown))}")
        for key, size in sizes.items():
            if size != math.prod(partition.logical_shape(self._specs[key.partition("/")[2]])):
                raise ValueError(f"{size} elements of {key} are stored")

    def _check_pieces(self, spec: TensorSpec, stored: list[Piece]) -> None:
        """Fragments lie inside their physical tensor, do not overlap, and have stored what their rank keeps of them.

        Raises:
            ValueError: they do not.
        """
        partition = self.manifest.partition
        length = math.prod(partition.shape(spec))
        end = dict.fromkeys(range(partition.tensor_parallel), 0)
        for piece in sorted(stored, key=lambda piece: (piece.tp_rank, piece.start)):
            if piece.start < end.get(piece.tp_rank, length + 1) or piece.start + piece.numel > length:
                raise ValueError(f"{piece.shard.name} has an impossible fragment of {spec.name}")
            end[piece.tp_rank] = piece.start + piece.numel
            if piece.kept != kept_count(spec, partition, piece.tp_rank, piece.start, piece.numel):
                raise ValueError(f"{piece.shard.name} has {piece.kept} elements of its fragment of {spec.name}")


@dataclasses.dataclass(frozen=True)
class Found:
    """The newest checkpoint that can be used, and newer ones that cannot.

    Attributes:
        checkpoint: opened, its shards' checksums not taken yet.
        damaged: why each newer one was passed over, newest first.
    """

    checkpoint: Checkpoint
    damaged: tuple[DamagedCheckpoint, ...] = ()


def open_newest(run_dir: Path, damaged: tuple[DamagedCheckpoint, ...] = ()) -> Found | None:
    """The newest checkpoint of a run whose manifest, ledger and headers are whole, or None if the run has none at all.

    Args:
        run_dir: the run directory.
        damaged: checkpoints known not to be whole; only older ones are looked at.

    Raises:
        UserError: there are checkpoints and none of them is whole, or the newest is of another format version.
    """
    before = min((step_of(error.directory) for error in damaged), default=None)
    for path in reversed(step_directories(run_dir)):
        if before is not None and step_of(path) >= before:
            continue
        try:
            return Found(Checkpoint(path, verify=False), damaged)
        except DamagedCheckpoint as error:
            damaged = (*damaged, error)
    if not damaged:
        return None
    newest = damaged[0]
    raise UserError(
        f"no checkpoint of {run_dir} is whole; of the newest, file {newest.directory / newest.file} {newest.why}; "
        "restore the files, or start anew with another --save"
    )


def may_be_whole(error: DamagedCheckpoint) -> bool:
    """True if the disk failed to read a file, which may be whole and readable the next time."""
    return error.why.startswith(_UNREADABLE)


def shard_damage(directory: Path, name: str, digest: str) -> str | None:
    """Take the checksum of a shard; what is wrong with it, or None."""
    try:
        same = sha256_file(regular_file(directory, name)) == digest
    except DamagedCheckpoint as error:
        return error.why
    except OSError as error:
        return f"{_UNREADABLE} ({error.strerror})"
    return None if same else "is damaged (its checksum is not the manifest's)"


def verify_together(checkpoint: Checkpoint, mesh: Mesh) -> None:
    """Take the checksums of all shards, each rank those of its share; a collective of all ranks.

    Raises:
        DamagedCheckpoint: the same on every rank.
    """
    own = checkpoint.damage(checkpoint.shard_names()[mesh.rank :: mesh.world_size])
    found = [damage for damage in gather(own, mesh) if damage is not None]
    if found:
        raise DamagedCheckpoint(checkpoint.path, *found[0])
