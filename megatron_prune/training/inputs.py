"""What a run reads, opened and checked before a process group or DeepSpeed exists: a mistake costs seconds."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from megatron_prune.architecture import Architecture
from megatron_prune.checkpoint.files import sha256_file, sha256_of
from megatron_prune.checkpoint.hf import SourceWeights, has_weights, read_architecture, resolve_source
from megatron_prune.checkpoint.store import (
    COMPLETE_FILE,
    Checkpoint,
    DamagedCheckpoint,
    Found,
    open_newest,
    verify_together,
)
from megatron_prune.config import Config
from megatron_prune.data.blend import TokenBlend, parse_data_path
from megatron_prune.data.instructions import InstructionSamples, read_instructions
from megatron_prune.data.samples import Which
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.errors import ConfigError, UserError
from megatron_prune.ops.dispatch import Ops, build_ops, parse_forced
from megatron_prune.parallel.collectives import agreed
from megatron_prune.parallel.mesh import Mesh
from megatron_prune.parallel.partition import Partition
from megatron_prune.pruning.replay import Replay
from megatron_prune.training.batches import Samples
from megatron_prune.training.latency import saved_table
from megatron_prune.training.resume import newest_whole
from megatron_prune.training.targets import make_budget, make_replay

#: Of an instruction tuning's run directory: which weights it was started from, as :func:`base_digest` says it.
BASE_FILE = "base.sha256"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything read before a process group exists, so that a mistake costs seconds.

    Attributes:
        source_path: local directory or config file of the source.
        source: its architecture.
        weights: its weights, or None to start from random ones.
        train: training samples.
        valid: validation samples, or None.
        checkpoint: what to resume from, or None. The checksums of its shards are not taken yet: see :func:`verified`.
        ops: kernels.
        base: whose weights to start from (``--finetune``), or None. Verified as the checkpoint is.
        damaged: newer checkpoints that cannot be used.
        replay: the removals to repeat, or None.
    """

    source_path: Path
    source: Architecture
    weights: SourceWeights | None
    train: Samples
    valid: Samples | None
    checkpoint: Checkpoint | None
    ops: Ops
    base: Checkpoint | None = None
    damaged: tuple[DamagedCheckpoint, ...] = ()
    replay: Replay | None = None


def read_inputs(config: Config, source_path: Path, source: Architecture) -> Inputs:
    """Open and check everything the run reads.

    Raises:
        UserError: something is missing, damaged or does not fit the source.
    """
    ops = build_ops(parse_forced(config.train.op_impl), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found, base = _find_checkpoints(config)
    if found is not None:
        _check_same_source(found.checkpoint, config, source)
    replay = make_replay(config, source)
    if config.prune.needs_latency:
        table = saved_table(config, source, None if found is None else run_of(found.checkpoint))
        if table is not None:  # a latency out of its reach is refused here, where it need not be measured
            make_budget(config, source, replay, lambda: table)
    needed = not config.run.finetune and has_weights(source_path)  # or they are those of a checkpoint
    weights = SourceWeights(source_path, source) if needed else None
    if config.distill.distill_weight and weights is None:
        raise UserError(
            f"--distill-weight {config.distill.distill_weight} learns from --source {config.model.source}, which has "
            "no weights; give a source that has them, or drop it"
        )
    if config.run.directory is not None:
        _check_writable(Path(config.run.directory))
    if config.model.tokenizer is not None:
        _check_tokenizer(config.model.tokenizer, source)
    train, valid = _samples(config, source_path, source)
    return Inputs(
        source_path=source_path,
        source=source,
        weights=weights,
        train=train,
        valid=valid,
        checkpoint=None if found is None else found.checkpoint,
        ops=ops,
        base=None if base is None else base.checkpoint,
        damaged=() if found is None else found.damaged,
        replay=replay,
    )


def _samples(config: Config, source_path: Path, source: Architecture) -> tuple[Samples, Samples | None]:
    """What to train on and what to validate on."""
    data, seed = config.data, config.train.seed
    if data.instruction_data is not None:
        tokenizer = load_tokenizer(config.model.tokenizer or str(source_path))
        examples = read_instructions(Path(data.instruction_data))
        return InstructionSamples(examples, tokenizer, data.seq_length, seed, source.vocab_size), None
    blends = parse_data_path(data.data_path)

    def blend(which: Which) -> TokenBlend:
        return TokenBlend(blends, data.seq_length, seed, data.split, which, source.vocab_size)

    return blend("train"), blend("valid") if config.run.eval_interval else None


def read_source(config: Config) -> tuple[Path, Architecture]:
    """Locate the source and read its architecture; under ``--finetune``, the pruned one that the run starts with.

    Raises:
        UserError: it is missing or of an unsupported kind, or ``--load`` holds no pruned version of it.
    """
    assert config.model.source is not None, "validate_config checks it"
    path = resolve_source(config.model.source)
    source = read_architecture(path)
    if not config.run.finetune:
        return path, source
    own, base = _find_checkpoints(config)
    if own is not None:
        return path, own.checkpoint.manifest.partition.source
    assert base is not None
    pruned = base.checkpoint.manifest.partition.architecture()
    if not _is_pruned(pruned, source):
        raise UserError(
            f"--finetune: {base.checkpoint.path} is no pruned shape of --source {config.model.source}; "
            "give the source that run was started from"
        )
    return path, pruned


def verified(config: Config, inputs: Inputs, mesh: Mesh) -> Inputs:
    """Take the checksums of the shards to be read, and go back past damaged checkpoints; a collective of all ranks.

    Returns:
        The inputs with the newest whole checkpoint, and all that were passed over.

    Raises:
        UserError: no checkpoint is whole, or that of ``--finetune`` is not; the same on every rank.
        MegatronPruneError: the ranks opened different ones.
    """
    if inputs.base is not None:
        agreed(str(inputs.base.path), mesh)
        verify_together(inputs.base, mesh)  # an older one may have another shape, which all was planned for
    opened = None if inputs.checkpoint is None else Found(inputs.checkpoint, inputs.damaged)
    found = newest_whole(opened, mesh)
    if found is None:
        return inputs
    _check_same_source(found.checkpoint, config, inputs.source)
    return dataclasses.replace(inputs, checkpoint=found.checkpoint, damaged=found.damaged)


def placement(saved: Partition, config: Config) -> Partition:
    """Where the units of a checkpoint go: where they were on the same layout, else dealt out afresh."""
    ranks = config.parallel.tensor_model_parallel_size
    return saved if saved.tensor_parallel == ranks else saved.spread(ranks, max(1, config.prune.prune_align))


def base_digest(directory: Path) -> str:
    """What tells weights to start from apart from others, wherever they lie.

    Args:
        directory: a checkpoint, whose marker stands for all its files, or a Hugging Face directory, read in full.

    Returns:
        A checksum in hexadecimal.
    """
    marker = directory / COMPLETE_FILE
    files = [marker] if marker.is_file() else sorted(directory.glob("*.safetensors"))
    return sha256_of("".join(map(sha256_file, files)).encode())


def run_of(checkpoint: Checkpoint) -> Path:
    """The run directory that a checkpoint lies in."""
    return checkpoint.path.parent.parent


def is_own(checkpoint: Checkpoint, config: Config) -> bool:
    """True for a checkpoint of the run directory, not of another one that ``--load`` names."""
    return config.run.directory is not None and run_of(checkpoint) == Path(config.run.directory)


def _find_checkpoints(config: Config) -> tuple[Found | None, Found | None]:
    """What to resume from, and whose weights to start from; at most one of them.

    The run directory comes first: a requeued job must not go back to its origin.

    Raises:
        ConfigError: they cannot be used. All processes of a node see the same files.
        UserError: ``--load`` holds none.
    """
    run = config.run
    try:
        own = None if run.directory is None else open_newest(Path(run.directory))
        loaded = None if own is not None or run.load is None else open_newest(Path(run.load))
    except UserError as error:
        raise ConfigError([str(error)]) from error
    if own is not None or run.load is None:
        return own, None
    if loaded is None:
        raise UserError(f"--load {run.load} holds no complete checkpoint; check it, or drop --load to start anew")
    return (None, loaded) if run.finetune else (loaded, None)


def _check_same_source(checkpoint: Checkpoint, config: Config, source: Architecture) -> None:
    if checkpoint.manifest.partition.source != source:
        raise UserError(
            f"{checkpoint.path} was started from another source than --source {config.model.source}; "
            "give the same source (and --finetune if it was given), or another --save to start anew"
        )


def _is_pruned(pruned: Architecture, source: Architecture) -> bool:
    """True if only widths that pruning shrinks differ."""
    same = dataclasses.replace(
        source,
        hidden_size=pruned.hidden_size,
        ffn_hidden_size=pruned.ffn_hidden_size,
        num_attention_heads=pruned.num_attention_heads,
        kv_groups=pruned.kv_groups,
    )
    widths = zip(_widths(pruned), _widths(source), strict=True)
    return same == pruned and all(narrow <= wide for narrow, wide in widths)


def _widths(arch: Architecture) -> tuple[int, int, int]:
    return arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads


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
