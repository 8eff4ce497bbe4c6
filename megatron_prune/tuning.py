"""Instruction tuning by the trainer of pruning: the settings that go with it, and what follows it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from megatron_prune.architecture import Architecture
from megatron_prune.checkpoint.hf import SourceWeights, check_replaceable, read_architecture
from megatron_prune.checkpoint.run_export import is_run_directory
from megatron_prune.checkpoint.store import CHECKPOINTS, SOURCE_DIR, open_newest, step_directories
from megatron_prune.config import Config
from megatron_prune.config.yaml_file import read_yaml
from megatron_prune.data.instructions import InstructionSamples, read_instructions, steps_of
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.training.inputs import BASE_FILE, base_digest

#: Where the tuned model goes, under the run directory.
EXPORT_DIR: Final = "export"
MAX_MICRO_BATCH: Final = 4
#: One warm-up step in so many.
WARMUP_SHARE: Final = 0.03
#: Flags that this module derives; whoever wants to set them all by hand calls pretrain_prune.py.
DERIVED: Final = ("--config", "--train-iters", "--source", "--load", "--finetune", "--data-path", "--instruction-data")


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What to tune and on what.

    Attributes:
        model: Hugging Face directory, or a run directory, whose newest checkpoint is taken as it is.
        data: file in Alpaca's format.
        save: run directory of the tuning.
        epochs: times around the data.
        seq_length: longest example in tokens; the rest is cut off.
        global_batch_size: examples per optimizer step.
        lr: peak learning rate.
        tokenizer: what :func:`load_tokenizer` takes, or None for the model's own.
    """

    model: Path
    data: Path
    save: Path
    epochs: float = 3.0
    seq_length: int = 512
    global_batch_size: int = 128
    lr: float = 2e-5
    tokenizer: str | None = None

    @property
    def source(self) -> Path:
        """Where config and tokenizer are."""
        return self.model / SOURCE_DIR if is_run_directory(self.model) else self.model


def check(tuning: Tuning, flags: Sequence[str]) -> None:
    """Refuse what would contradict the settings made here.

    Raises:
        UserError: says what.
    """
    for word in flags:
        flag = word.split("=", 1)[0].replace("_", "-")
        if flag in DERIVED:
            raise UserError(f"{flag} is set by finetune.py itself; drop it, or call pretrain_prune.py with it")
    if not (math.isfinite(tuning.epochs) and tuning.epochs > 0):
        raise UserError(f"--epochs {tuning.epochs} must be above 0 and finite")
    if not (math.isfinite(tuning.lr) and tuning.lr > 0):
        raise UserError(f"--lr {tuning.lr} must be above 0 and finite")
    if tuning.global_batch_size < 1 or tuning.seq_length < 1:
        raise UserError("--global-batch-size and --seq-length must both be 1 or more")
    if not (tuning.source / "config.json").is_file():
        raise UserError(f"{tuning.model} is neither a Hugging Face model directory nor the --save of a run")
    if os.path.realpath(tuning.save) == os.path.realpath(tuning.model):
        raise UserError(f"--save {tuning.save} is the model to tune; give another directory")


def whole_model(directory: Path) -> Architecture:
    """Architecture of a Hugging Face directory that has all its weights: nothing is tuned from random ones.

    Raises:
        UserError: they are missing, damaged or not those of its config.
    """
    arch = read_architecture(directory)
    SourceWeights(directory, arch)  # checks them
    return arch


def check_target(save: Path, beside: str) -> None:
    """Keep what something else wrote, such as pruning or the model to tune itself, from being resumed or replaced.

    Args:
        save: run directory of the tuning.
        beside: what a tuning of this kind has left beside its export.

    Raises:
        UserError: there is a run or an export that it has not written.
    """
    if _holds_run(save) and not (beside == CHECKPOINTS and _holds_tuning(save)):
        raise UserError(f"--save {save} is the directory of another run, which would be lost; give another --save")
    check_replaceable(save / EXPORT_DIR)
    if (save / EXPORT_DIR).exists() and not (save / beside).is_dir():
        raise UserError(f"--save {save} has a directory {EXPORT_DIR!r} that is not of this tuning; give another --save")


def _holds_run(save: Path) -> bool:
    metrics = save / "metrics.jsonl"
    logged = metrics.is_file() and metrics.stat().st_size > 0
    return logged or (save / "config.yaml").exists() or bool(step_directories(save))


def _holds_tuning(save: Path) -> bool:
    """Whether all that is recorded of a run says that it learnt instructions."""
    found, config = open_newest(save), save / "config.yaml"
    records = [] if found is None else [found.checkpoint.manifest.settings.get("data", {})]
    records += [read_yaml(str(config))] if config.exists() else []
    return bool(records) and all(record.get("instruction_data") is not None for record in records)


def check_same(settings: Config, fingerprint: str) -> None:
    """Refuse to go on with another model or other data, or to give out a finished tuning as the result of settings
    that it is not the result of.

    More epochs are no such settings: the tuning goes on.

    Args:
        settings: of the trainer, with the run directory.
        fingerprint: of the samples.

    Raises:
        UserError: names the first flag that was another.
    """
    assert settings.run.save is not None, "trainer_flags gives it"
    found = open_newest(Path(settings.run.save))
    if found is None:
        return
    manifest, iters = found.checkpoint.manifest, settings.train.train_iters
    saved_iters, step = manifest.setting("train", "train_iters"), manifest.progress.step
    is_finished = step >= min(iters, saved_iters)

    def differs(topic: str, name: str, place: bool = False) -> bool:
        now = getattr(getattr(settings, topic), name)
        then = manifest.settings[topic].get(name, now)
        return bool(then != now and not (place and then and now and os.path.realpath(then) == os.path.realpath(now)))

    is_other = _is_other_base(settings)
    if is_other is None:
        is_other = differs("model", "source", place=True) or differs("run", "load", place=True)
    changes = {
        "MODEL": is_other,
        "--seq-length": differs("data", "seq_length"),
        "--seed": differs("train", "seed"),
        "--data (or --tokenizer)": manifest.data_fingerprint != fingerprint,
    }
    if is_finished:
        changes |= {"--global-batch-size": differs("train", "global_batch_size"), "--epochs": iters < saved_iters}
        fields = (field.name for field in dataclasses.fields(settings.optim))
        derived = set() if iters == saved_iters else {"lr_warmup_iters"}
        changes |= {f"--{name.replace('_', '-')}": differs("optim", name) for name in fields if name not in derived}
    changed = [flag for flag, is_changed in changes.items() if is_changed]
    if changed:
        raise UserError(
            f"--save {settings.run.save} holds {'a finished' if is_finished else 'an unfinished'} tuning with another "
            f"{changed[0]}; give another --save to tune anew, or the same as then"
        )


def _is_other_base(settings: Config) -> bool | None:
    """Whether the tuning was started from other weights than it would be now; None if it has not recorded them."""
    run, source = settings.run, settings.model.source
    assert run.save is not None, "trainer_flags gives it"
    assert source is not None, "so it does here"
    record = Path(run.save) / BASE_FILE
    if not record.is_file():
        return None
    base = open_newest(Path(run.load)) if run.load is not None else None
    return record.read_bytes() != base_digest(Path(source) if base is None else base.checkpoint.path).encode()


def samples_of(tuning: Tuning, vocab_size: int, seed: int = 0) -> InstructionSamples:
    """The examples as the trainer sees them.

    Raises:
        UserError: the file or the tokenizer is not as it should be.
    """
    tokenizer = load_tokenizer(tuning.tokenizer or str(tuning.source))
    return InstructionSamples(read_instructions(tuning.data), tokenizer, tuning.seq_length, seed, vocab_size)


def steps(tuning: Tuning, samples: InstructionSamples) -> int:
    """Optimizer steps of all epochs."""
    return steps_of(len(samples), tuning.epochs, tuning.global_batch_size)


def trainer_flags(tuning: Tuning, train_iters: int, copies: int, flags: Sequence[str]) -> list[str]:
    """Flags of ``pretrain_prune.py`` that make the tuning run.

    Args:
        tuning: what to do.
        train_iters: optimizer steps.
        copies: of the model, for the size of a micro-batch.
        flags: the user's own; what they name is left to them.
    """
    values = {
        "source": tuning.source,
        "instruction-data": tuning.data,
        "save": tuning.save,
        "train-iters": train_iters,
        "seq-length": tuning.seq_length,
        "global-batch-size": tuning.global_batch_size,
        "micro-batch-size": math.gcd(max(1, tuning.global_batch_size // copies), MAX_MICRO_BATCH),
        "lr": tuning.lr,
        "lr-warmup-iters": int(WARMUP_SHARE * train_iters),
        "lr-decay-style": "cosine",
        "weight-decay": 0.0,
        "eval-interval": 0,
        "precision": "bf16" if torch.cuda.is_available() else "fp32",
    }
    given = {word.split("=", 1)[0].replace("_", "-") for word in flags if word.startswith("--")}
    made = [part for name, value in values.items() if f"--{name}" not in given for part in (f"--{name}", str(value))]
    start = ["--load", str(tuning.model), "--finetune"] if is_run_directory(tuning.model) else []
    start += [] if tuning.tokenizer is None else ["--tokenizer", tuning.tokenizer]
    return [*made, *start, *flags]
