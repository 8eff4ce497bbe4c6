"""From a run directory to a Hugging Face model: the newest checkpoint, exported and verified."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

from megatron_prune.architecture import Architecture
from megatron_prune.checkpoint.files import short
from megatron_prune.checkpoint.hf import (
    ExportReport,
    SourceWeights,
    VerifyReport,
    check_weights,
    export_verified,
    read_architecture,
    read_config,
)
from megatron_prune.checkpoint.store import CHECKPOINTS, SOURCE_DIR, Checkpoint, newest_checkpoint
from megatron_prune.errors import UserError

#: Precisions of stored weights by their names in our settings.
DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)
MAX_SHARD_BYTES: Final = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class RunExport:
    """What :func:`export_run` wrote.

    Attributes:
        report: of the writing.
        verified: of the comparison with the checkpoint.
        architecture: of the model.
        step: of the checkpoint.
    """

    report: ExportReport
    verified: VerifyReport
    architecture: Architecture
    step: int


def is_run_directory(path: Path) -> bool:
    """True for what a training run writes to (``--save``)."""
    return (path / CHECKPOINTS).is_dir()


def export_run(
    run_dir: Path, directory: Path, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> RunExport:
    """Export the newest complete checkpoint of a run.

    Args:
        run_dir: what ``--save`` was.
        directory: where the model goes; absent, empty or an earlier export.
        dtype: a name of :data:`DTYPES`; the run's precision by default.
        max_shard_bytes: largest weights file.

    Raises:
        UserError: there is no complete checkpoint, or the target may not be replaced.
        MegatronPruneError: what was written differs from the checkpoint.
    """
    newest = newest_checkpoint(run_dir)
    if newest is None:
        raise UserError(f"{run_dir} holds no complete checkpoint; give the directory that was --save of a run")
    checkpoint = Checkpoint(newest)
    manifest, specs = checkpoint.manifest, checkpoint.specs()
    arch = manifest.partition.architecture()
    precision = dtype or str(manifest.setting("train", "precision"))
    if precision not in DTYPES:
        raise UserError(f"{newest} was trained in {short(precision)}, which is none of ours; give --dtype")
    report, verified = export_verified(
        directory,
        arch,
        lambda name: checkpoint.live(specs[name]),
        dtype=DTYPES[precision],
        tokenizer_dir=run_dir / SOURCE_DIR,
        source_config=read_config(run_dir / SOURCE_DIR),
        max_shard_bytes=max_shard_bytes,
    )
    return RunExport(report, verified, arch, manifest.progress.step)


def model_directory(path: Path) -> Path:
    """A Hugging Face directory as it is; of a run directory, its newest checkpoint's export, made unless it is there.

    Args:
        path: either of the two.

    Returns:
        ``path``, or ``path/exports/step_...``.

    Raises:
        UserError: it is neither.
    """
    if not is_run_directory(path):
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is neither a Hugging Face model directory nor the --save of a run; check the path")
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise UserError(f"{path} holds no complete checkpoint yet; wait for one, or give an export")
    directory = path / "exports" / newest.name
    if not directory.exists():  # exports are complete or not there
        try:
            export_run(path, directory)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"{directory} cannot be written ({reason}); export elsewhere with tools/convert_to_hf.py --save"
            ) from error
    return directory


def check_export(directory: Path) -> None:
    """See, before work begins, that a Hugging Face directory has whole weights of floating point.

    Raises:
        UserError: it is 8-bit already, or weights are missing, pickled, damaged or of another shape than promised.
    """
    if read_config(directory).get("quantization_config"):
        raise UserError(f"{directory} is quantised already; give the export that it was made from")
    try:
        arch = read_architecture(directory)
    except UserError:  # a kind that is ours to write and not to read, e.g. Seed-OSS
        check_weights(directory)
    else:
        SourceWeights(directory, arch)
