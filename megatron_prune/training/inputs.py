"""What a run reads, opened and checked before a process group or DeepSpeed exists: a mistake costs seconds."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from megatron_prune.architecture import Architecture
from megatron_prune.checkpoint.hf import SourceWeights, has_weights, read_architecture, resolve_source
from megatron_prune.checkpoint.store import Checkpoint, newest_checkpoint
from megatron_prune.config import Config
from megatron_prune.data.blend import TokenBlend, parse_data_path
from megatron_prune.data.samples import Which
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.ops.dispatch import Ops, build_ops, parse_forced


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything read before a process group exists, so that a mistake costs seconds.

    Attributes:
        source_path: local directory or config file of the source.
        source: its architecture.
        weights: its weights, or None to start from random ones.
        train: training samples.
        valid: validation samples, or None.
        checkpoint: what to resume from, or None.
        ops: kernels.
    """

    source_path: Path
    source: Architecture
    weights: SourceWeights | None
    train: TokenBlend
    valid: TokenBlend | None
    checkpoint: Checkpoint | None
    ops: Ops


def read_inputs(config: Config, source_path: Path, source: Architecture) -> Inputs:
    """Open and check everything the run reads.

    Raises:
        UserError: something is missing, damaged or does not fit the source.
    """
    ops = build_ops(parse_forced(config.train.op_impl), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    weights = SourceWeights(source_path, source) if has_weights(source_path) else None
    if config.run.directory is not None:
        _check_writable(Path(config.run.directory))
    if config.model.tokenizer is not None:
        _check_tokenizer(config.model.tokenizer, source)
    blends = parse_data_path(config.data.data_path)

    def blend(which: Which) -> TokenBlend:
        data, seed = config.data, config.train.seed
        return TokenBlend(blends, data.seq_length, seed, data.split, which, source.vocab_size)

    return Inputs(
        source_path=source_path,
        source=source,
        weights=weights,
        train=blend("train"),
        valid=blend("valid") if config.run.eval_interval else None,
        checkpoint=_find_checkpoint(config, source),
        ops=ops,
    )


def read_source(config: Config) -> tuple[Path, Architecture]:
    """Locate the source and read its architecture.

    Raises:
        UserError: it is missing or of an unsupported kind.
    """
    assert config.model.source is not None, "validate_config checks it"
    path = resolve_source(config.model.source)
    return path, read_architecture(path)


def _find_checkpoint(config: Config, source: Architecture) -> Checkpoint | None:
    """The newest checkpoint of the run directory, else of ``--load``: a requeued job must not go back to its origin."""
    run = config.run
    places = [Path(place) for place in (run.directory, run.load) if place is not None]
    newest = next((found for found in map(newest_checkpoint, places) if found is not None), None)
    if newest is None:
        if run.load is not None:
            raise UserError(f"--load {run.load} holds no complete checkpoint; check it, or drop --load to start anew")
        return None
    checkpoint = Checkpoint(newest)
    if checkpoint.manifest.partition.source != source:
        raise UserError(
            f"{newest} was started from another source than --source {config.model.source}; "
            "give the same source, or another --save to start anew"
        )
    return checkpoint


def _check_writable(directory: Path) -> None:
    """A run directory that cannot be made should fail now, not after the model is built."""
    existing = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "is not writable" if existing.is_dir() else "is a file"
        raise UserError(f"--save {directory}: {existing} {reason}; give a directory that this process may write")


def _check_tokenizer(tokenizer: str, source: Architecture) -> None:
    size = load_tokenizer(tokenizer).vocab_size
    if size > source.vocab_size:
        raise UserError(
            f"--tokenizer {tokenizer} has {size} tokens but the model only {source.vocab_size}; give the source's own"
        )
