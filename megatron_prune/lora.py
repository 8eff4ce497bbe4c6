"""Instruction tuning of low-rank adapters (LoRA, Hu et al. 2021) by peft and transformers' Trainer, in one process.

The trainer of pruning updates whole matrices and has no place for adapters; this path shares its samples and its loss,
the mean over the response tokens of a batch, and nothing else.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from megatron_prune.checkpoint.hf import copy_companions, export_verified, read_architecture, read_config, replacing
from megatron_prune.checkpoint.run_export import MAX_SHARD_BYTES
from megatron_prune.data.instructions import InstructionSamples
from megatron_prune.errors import UserError
from megatron_prune.evaluation.scoring import load_model
from megatron_prune.parallel.linear_loss import IGNORED
from megatron_prune.training.run_dir import locked
from megatron_prune.tuning import EXPORT_DIR, MAX_MICRO_BATCH, WARMUP_SHARE

ADAPTER_DIR: Final = "adapter"
#: LoRA's alpha for a rank of 1: the adapters' product is scaled by alpha / rank.
ALPHA_PER_RANK: Final = 2


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """How adapters are trained.

    Attributes:
        rank: of every adapter.
        lr: peak learning rate.
        steps: optimizer steps.
        global_batch_size: examples per step.
        seed: of the adapters' start.
    """

    rank: int
    lr: float
    steps: int
    global_batch_size: int
    seed: int


def train_adapters(
    directory: Path, samples: InstructionSamples, settings: LoraSettings, save: Path, tokenizer: str | None = None
) -> Path:
    """Train adapters of all linear layers but the head, keep them, and merge them into a model of the usual form.

    Args:
        directory: Hugging Face directory of the model.
        samples: what to train on.
        settings: how.
        save: ``adapter`` and ``export`` go here.
        tokenizer: that goes with the merged model, in place of the model's own.

    Returns:
        The directory of the merged model, in fp32, which stock transformers has loaded and found equal.

    Raises:
        UserError: peft is not installed, several GPUs are visible, there is no model, ``save`` cannot be written or is
            in use, or the training ended with weights that are no numbers; then nothing is written.
        MegatronPruneError: what was written is not what was trained.
    """
    if settings.rank < 1:
        raise UserError(f"--lora-rank {settings.rank} must be 1 or more")
    if importlib.util.find_spec("peft") is None:  # accelerate, which transformers' Trainer needs, comes with it
        raise UserError("--lora-rank needs the package peft; pip install peft")
    if torch.cuda.device_count() > 1:  # the Trainer would give each of them a batch of its own
        raise UserError(
            f"--lora-rank works on one GPU and {torch.cuda.device_count()} are visible; set CUDA_VISIBLE_DEVICES=0"
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed, which would warn of finding none
    with locked(save):
        weights = _train(directory, samples, settings, save)
        with tempfile.TemporaryDirectory() as companions:
            copy_companions(directory, Path(companions), tokenizer)
            export_verified(
                save / EXPORT_DIR,
                read_architecture(directory),
                weights,
                dtype=torch.float32,
                tokenizer_dir=Path(companions),
                source_config=read_config(directory),
                max_shard_bytes=MAX_SHARD_BYTES,
            )
    return save / EXPORT_DIR


def _train(directory: Path, samples: InstructionSamples, settings: LoraSettings, save: Path) -> dict[str, Tensor]:
    """The merged model's weights by name, once the adapters are kept."""
    import peft
    import transformers

    logging.getLogger("peft").setLevel(logging.ERROR)
    transformers.set_seed(settings.seed)
    model = load_model(directory)
    adapters = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=ALPHA_PER_RANK * settings.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted: Any = peft.get_peft_model(model, adapters)
    trainer = transformers.Trainer(
        model=adapted,
        args=_arguments(settings, save),
        train_dataset=_InOrder(samples, settings.steps * settings.global_batch_size),
        data_collator=_collate,
    )
    trainer.train()
    with replacing(save / ADAPTER_DIR) as scratch:
        adapted.save_pretrained(str(scratch))
        weights: dict[str, Tensor] = adapted.merge_and_unload().state_dict()
        if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
            raise UserError(f"the training at --lr {settings.lr:g} ended with weights that are no numbers; lower it")
    return weights


def _arguments(settings: LoraSettings, save: Path) -> Any:
    import transformers

    micro = min(settings.global_batch_size, MAX_MICRO_BATCH)
    while settings.global_batch_size % micro:
        micro -= 1
    return transformers.TrainingArguments(
        output_dir=str(save),
        max_steps=settings.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.global_batch_size // micro,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=int(WARMUP_SHARE * settings.steps),
        weight_decay=0.0,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        train_sampling_strategy="sequential",  # the samples come in an order of their own
        use_cpu=not torch.cuda.is_available(),
    )


class _InOrder(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The first so many samples, as tokens ``[S + 1]`` and what of the targets counts ``[S]``."""

    def __init__(self, samples: InstructionSamples, count: int) -> None:
        self._samples = samples
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._samples.batch(index, 1)[0], self._samples.counted(index, 1)[0]


def _collate(rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """transformers compares position ``i`` with label ``i + 1`` itself."""
    tokens = torch.stack([tokens for tokens, _ in rows])
    counted = torch.stack([counted for _, counted in rows])
    length = int(counted.any(dim=0).nonzero().max()) + 2
    labels = tokens.clone()
    labels[:, 0] = IGNORED
    labels[:, 1:].masked_fill_(~counted, IGNORED)
    return {"input_ids": tokens[:, :length], "labels": labels[:, :length]}
