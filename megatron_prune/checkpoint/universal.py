"""DeepSpeed's universal checkpoint format (0.19), written and read without DeepSpeed.

One directory per parameter of the pipeline module, under the name the engine knows it by, with one file per state::

    DIR/latest_universal                                the tag, here step_00000100
    DIR/step_00000100/mp_rank_00_model_states.pt        counters of the engine
    DIR/step_00000100/zero/optimizer_state.pt           parameter groups
    DIR/step_00000100/zero/1.mlp.up_proj.weight/        fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt
    DIR/step_00000100/manifest.json, ledger.jsonl       ours: what the way back needs

DeepSpeed gives tensor-parallel rank ``r`` of ``T`` the r-th of ``T`` equal slices of a parameter. So every file holds
the ranks' physical tensors one after the other along the dimension that is split, dead padding and copied KV heads
included: any number of heads loads under the ``T`` that it was written for. Written for one rank the tensors are the
plain model without padding, and load under every ``T`` that divides heads, KV heads and FFN channels alike.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prune.architecture import Architecture, TensorSpec, tensor_specs
from megatron_prune.checkpoint.files import (
    DamagedCheckpoint,
    read_file,
    regular_file,
    sha256_file,
    short,
    sync_directory,
    write_synced,
)
from megatron_prune.checkpoint.manifest import COMPLETE_FILE, LEDGER_FILE, MANIFEST_FILE, Manifest, complete_text
from megatron_prune.checkpoint.reshard import SavedStates, no_report, spread_checked
from megatron_prune.errors import UserError
from megatron_prune.parallel.partition import SPLIT_AXES, Partition, is_split
from megatron_prune.parallel.placement import deposit_, place, take
from megatron_prune.parallel.states import STATE_KINDS, StateKind
from megatron_prune.pruning.ledger import Ledger

LATEST_FILE = "latest_universal"
#: The DeepSpeed whose format this is; its loader refuses a checkpoint that names none.
DEEPSPEED_VERSION = "0.19.8"
#: ``adam`` decays matrices and spares vectors: two parameter groups, and DeepSpeed loads as many as a file lists.
_NUM_PARAM_GROUPS = 2
_FILES: dict[StateKind, str] = {"master": "fp32.pt", "exp_avg": "exp_avg.pt", "exp_avg_sq": "exp_avg_sq.pt"}
_STEP_FILE = "step.pt"
_ZERO = "zero"
_MOST_TAG_BYTES = 1 << 12


def engine_name(spec: TensorSpec, arch: Architecture) -> str:
    """Name of a tensor in the pipeline module, whose layers are counted from the embedding, layer 0."""
    if spec.layer is not None:
        return f"{spec.layer + 1}." + spec.name.removeprefix(f"model.layers.{spec.layer}.")
    if spec.name == "model.embed_tokens.weight":
        return "tied_modules.embed_tokens.weight" if arch.tie_embeddings else "0.weight"
    return f"{arch.num_layers + (1 if spec.name == 'model.norm.weight' else 2)}.weight"


def write_universal(
    saved: SavedStates,
    directory: Path,
    tensor_parallel: int = 1,
    quantum: int = 1,
    report: Callable[[int], None] = no_report,
) -> Path:
    """Write a checkpoint for ``engine.load_checkpoint(directory)`` with ``"checkpoint": {"load_universal": true}``.

    Holds one logical tensor at a time (and its padded form). What is there under its final name is whole.

    Args:
        saved: what to write.
        directory: DeepSpeed's ``load_dir``; the tag below it is named after the step.
        tensor_parallel: ranks the slices are made for.
        quantum: alignment of the padded widths when there is more than one rank.
        report: called with the bytes of every tensor written.

    Returns:
        The tag's directory.

    Raises:
        UserError: that step is there already, there are fewer heads than ranks, or the disk is full.
    """
    progress = saved.manifest.progress
    partition = spread_checked(saved.manifest.partition, tensor_parallel, quantum if tensor_parallel > 1 else 1)
    final = directory / f"step_{progress.step:08d}"
    if final.exists():
        raise UserError(f"{final} exists; give another directory or delete it first")
    scratch = directory / f".writing_{final.name}"
    try:
        if scratch.exists():  # left behind by an attempt that was killed
            shutil.rmtree(scratch)
        (scratch / _ZERO).mkdir(parents=True)
        _write_tag(scratch, saved, partition, report)
        scratch.rename(final)
        write_synced(directory / LATEST_FILE, final.name)
        sync_directory(directory)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise UserError(f"cannot write {final}: {error.strerror or error}") from error
    return final


def _write_tag(directory: Path, saved: SavedStates, partition: Partition, report: Callable[[int], None]) -> None:
    adam_steps = saved.manifest.progress.adam_steps
    for spec in saved.specs().values():
        home = directory / _ZERO / engine_name(spec, partition.source)
        home.mkdir()
        for kind in saved.kinds():
            whole = _joined(saved.live(spec, kind), spec, partition)
            _save(home / _FILES[kind], {"param": whole, **_how_to_slice(spec)})
            report(whole.nbytes)
        if adam_steps:
            _save(home / _STEP_FILE, torch.tensor(float(adam_steps)))
    # No settings in the groups: learning rate, betas and weight decay stay the loading engine's own.
    groups: list[dict[str, list[int]]] = [{"params": []} for _ in range(_NUM_PARAM_GROUPS)]
    _save(directory / _ZERO / "optimizer_state.pt", {"ds_version": DEEPSPEED_VERSION, "param_groups": groups})
    _save(directory / "mp_rank_00_model_states.pt", _engine_state(saved.manifest))
    _write_own_files(directory, saved, partition)


class UniversalCheckpoint:
    """A universal checkpoint opened for reading, in the manner of :class:`~megatron_prune.checkpoint.store.Checkpoint`.

    Files are read with ``torch.load(weights_only=True)``, which builds tensors and plain containers and runs nothing.
    Opening takes the checksums that the files, zip archives, have of their own.

    Args:
        path: a tag's directory, or the one with ``latest_universal``.
        like: checkpoint that says what the tensors belong to (model, ledger, data position), for a directory that
            DeepSpeed wrote itself; its tensors then are the plain model's. None: the directory's own manifest.

    Raises:
        UserError: something is missing or damaged.
    """

    def __init__(self, path: Path, like: SavedStates | None = None) -> None:
        self.path = _tag_directory(path)
        if like is None:
            self._written = Manifest.read(self.path)
            self.events = self._written.read_ledger(self.path)
        else:
            self._written = dataclasses.replace(like.manifest, partition=like.manifest.partition.spread(1))
            self.events = list(like.events)
        progress = self._written.progress
        advance = self._adam_steps() - progress.adam_steps
        if advance:
            progress = dataclasses.replace(
                progress, adam_steps=progress.adam_steps + advance, step=progress.step + advance
            )
        self.manifest = dataclasses.replace(self._written, progress=progress)
        for spec in self.specs().values():
            for kind in self.kinds():
                _check_archive(self._file(spec, kind), self.path)

    def specs(self) -> dict[str, TensorSpec]:
        """The model's tensors by logical name."""
        return {spec.name: spec for spec in tensor_specs(self._written.partition.source)}

    def kinds(self) -> tuple[StateKind, ...]:
        """The states that are stored: masters, and moments unless no step was taken."""
        return STATE_KINDS if self.manifest.progress.adam_steps else STATE_KINDS[:1]

    def live(self, spec: TensorSpec, kind: StateKind = "master") -> Tensor:
        """The live fp32 tensor of one state.

        Raises:
            UserError: its file is missing, damaged, or not of this model's shape.
        """
        partition = self._written.partition
        ranks = range(partition.tensor_parallel if is_split(spec) else 1)
        dim, shape = _split_dim(spec), list(partition.shape(spec))
        width = shape[dim]
        shape[dim] = width * len(ranks)
        whole = self._read(spec, kind)
        if list(whole.shape) != shape or whole.dtype != torch.float32:
            raise UserError(
                f"{self._file(spec, kind)} holds {whole.dtype} {list(whole.shape)}, not the model's fp32 {shape}; "
                "was it made from another shape of the model?"
            )
        if partition.tensor_parallel == 1:
            return whole  # written without padding
        logical = torch.zeros(partition.logical_shape(spec), dtype=torch.float32)
        for rank in ranks:
            physical = whole.narrow(dim, rank * width, width)
            deposit_(logical, physical.reshape(-1), spec, partition, rank, 0)
        return logical

    def fragment(
        self, spec: TensorSpec, kind: StateKind, partition: Partition, tp_rank: int, start: int, numel: int
    ) -> Tensor:
        """A rank's fragment under any placement, fp32 ``[numel]``; see :meth:`live` for what it raises."""
        return take(self.live(spec, kind), spec, partition, tp_rank, start, numel)

    def _adam_steps(self) -> int:
        """Optimizer steps the moments have seen, 0 without moments."""
        first = next(iter(self.specs().values()))
        if not self._file(first, "exp_avg").exists():
            return 0
        path = self._file(first, "master").with_name(_STEP_FILE)
        _check_archive(path, self.path)
        steps = _load(path)
        if isinstance(steps, Tensor):
            steps = steps.item() if _is_plain(steps) and steps.numel() == 1 else None
        if not isinstance(steps, int | float) or not 0 < steps < 2**53 or steps != int(steps):
            raise UserError(f"{path} holds no number of steps")
        return int(steps)

    def _file(self, spec: TensorSpec, kind: StateKind) -> Path:
        return self.path / _ZERO / engine_name(spec, self._written.partition.source) / _FILES[kind]

    def _read(self, spec: TensorSpec, kind: StateKind) -> Tensor:
        path = self._file(spec, kind)
        content = _load(path)
        tensor = content.get("param") if isinstance(content, dict) else None
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path} holds no entry 'param'; is it a universal checkpoint of DeepSpeed 0.19?")
        if not _is_plain(tensor):
            raise UserError(f"{path} holds a sparse, nested or meta tensor; DeepSpeed 0.19 writes plain ones")
        return tensor.detach()  # of a parameter, which would ask for gradients


def _tag_directory(path: Path) -> Path:
    if (path / _ZERO).is_dir():
        return path
    try:
        tag = read_file(path, LATEST_FILE, _MOST_TAG_BYTES).decode().strip()
    except (DamagedCheckpoint, ValueError) as error:
        why = error.why if isinstance(error, DamagedCheckpoint) else "is no text"
        raise UserError(
            f"{path} is no DeepSpeed universal checkpoint: it has no {_ZERO}/, and {LATEST_FILE} {why}"
        ) from error
    directory = path / tag
    if tag == ".." or Path(tag).name != tag or directory.is_symlink() or not (directory / _ZERO).is_dir():
        raise UserError(f"{path / LATEST_FILE} names {short(tag)}, which is no directory with {_ZERO}/ beside it")
    return directory


def _split_dim(spec: TensorSpec) -> int:
    """Dimension that tensor parallelism splits, 0 where there is none."""
    return next((dim for dim, axis in enumerate(spec.axes) if axis in SPLIT_AXES), 0)


def _joined(live: Tensor, spec: TensorSpec, partition: Partition) -> Tensor:
    """The physical tensors of all tensor-parallel ranks, side by side along the split dimension."""
    if not is_split(spec) or partition.tensor_parallel == 1:
        return place(live, spec, partition)
    parts = [place(live, spec, partition, rank) for rank in range(partition.tensor_parallel)]
    return torch.cat(parts, _split_dim(spec))


def _how_to_slice(spec: TensorSpec) -> dict[str, Any]:
    """DeepSpeed's words for a file: the dimension it cuts, and whether it may pad the rows for more ranks."""
    return {"cat_dim": _split_dim(spec)} | ({"vocab_tensor": True} if "vocab" in spec.axes else {})


def _write_own_files(directory: Path, saved: SavedStates, partition: Partition) -> None:
    """What the way back needs. The manifest goes on naming the shards of the checkpoint that this was made from."""
    Ledger(directory / LEDGER_FILE).restore(list(saved.events))
    ledger = sha256_file(directory / LEDGER_FILE)
    text = dataclasses.replace(saved.manifest, partition=partition, ledger=ledger).to_json()
    write_synced(directory / MANIFEST_FILE, text)
    write_synced(directory / COMPLETE_FILE, complete_text(text))


def _engine_state(manifest: Manifest) -> dict[str, Any]:
    progress = manifest.progress
    return {
        "ds_version": DEEPSPEED_VERSION,
        "dp_world_size": 1,
        "mp_world_size": 1,  # of the files; the one there is serves any number of ranks
        "global_steps": progress.step,
        "global_samples": progress.consumed_samples,
        "skipped_steps": progress.skipped,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
    }


def _save(path: Path, content: Any) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _check_archive(path: Path, root: Path) -> None:
    """A file of tensors lies below the root, without links, and its records are as they were written.

    Raises:
        UserError: it does not, or they are not.
    """
    for below in (path, *path.parents):
        if below == root:
            break
        if below.is_symlink():
            raise UserError(f"{path} is reached by a link, {below.name}; links are not followed")
    regular_file(path.parent, path.name)
    try:
        with zipfile.ZipFile(path) as archive:
            # torch stores its records as they are; one that inflates would ask for more memory than the file is long.
            records = archive.infolist()
            if (
                any(record.compress_type != zipfile.ZIP_STORED for record in records)
                or sum(record.file_size for record in records) > path.stat().st_size
            ):
                raise UserError(f"{path} is compressed or damaged; universal checkpoints are neither")
            wrong = archive.testzip()
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError) as error:
        raise _unreadable(path, error) from error
    if wrong is not None:
        raise UserError(f"{path} is damaged (wrong checksum of {short(wrong)}); restore it")


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a pickle of anyone's makes the unpickler raise can be anything
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{path} cannot be read as plain tensors ({reason})")


def _is_plain(tensor: Tensor) -> bool:
    """Its elements are there, one after another: no sparse, nested or meta tensor."""
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
