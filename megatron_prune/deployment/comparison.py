"""A model at several precisions, side by side: size, perplexity, answers, speed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from megatron_prune.deployment.quantize import model_bytes
from megatron_prune.evaluation.cloze import Question
from megatron_prune.evaluation.scoring import load_causal_lm, score_questions, validation_loss
from megatron_prune.training.latency import time_decoding

#: Tokens of context that a decoded token is timed after.
CONTEXT: Final = 128
_FP32_BYTES, _BF16_BYTES = 4, 2


@dataclasses.dataclass(frozen=True)
class Precision:
    """One line of the table.

    Attributes:
        name: fp32, bf16 or int8.
        num_bytes: of the weights.
        perplexity: on held-out text, per token.
        accuracy: mean share of questions answered rightly over the tasks, or None without questions.
        decode_ms: milliseconds a token at batch 1 in transformers, the median of a few dozen.
    """

    name: str
    num_bytes: int
    perplexity: float
    accuracy: float | None
    decode_ms: float


def compare_precisions(
    export: Path,
    quantized: Path,
    text: Tensor,
    tasks: Mapping[str, Sequence[Question]],
    on_done: Callable[[str], None],
) -> list[Precision]:
    """Measure an export in fp32, in bf16 and quantised, loaded by stock transformers.

    Args:
        export: directory with floating-point weights.
        quantized: directory of its 8-bit form.
        text: int64 ``[samples, length]``, held out.
        tasks: questions by task; may be empty.
        on_done: called with the name of each precision once it is measured.
    """
    rows = []
    for name, directory, dtype in (
        ("fp32", export, torch.float32),
        ("bf16", export, torch.bfloat16),
        ("int8", quantized, torch.float32),
    ):
        model, tokenizer = load_causal_lm(directory, dtype)
        count = sum(parameter.numel() for parameter in model.parameters())
        sizes = {"fp32": _FP32_BYTES * count, "bf16": _BF16_BYTES * count}
        rows.append(
            Precision(
                name,
                sizes.get(name) or model_bytes(directory),
                math.exp(validation_loss(model, text.split(1))),
                _accuracy(model, tokenizer, tasks),
                time_decoding(model, CONTEXT),
            )
        )
        on_done(name)
    return rows


def precision_table(rows: Sequence[Precision]) -> list[str]:
    """The rows under a heading, with ratios to the first (fp32) and to the second (bf16) where they are asked about."""
    first, second = rows[0], rows[1]
    heading = ("precision", "bytes", "of fp32", "perplexity", "to bf16", "accuracy", "ms/token", "of fp32")
    cells = [
        (
            row.name,
            f"{row.num_bytes:,}",
            f"{row.num_bytes / first.num_bytes:.3f}",
            f"{row.perplexity:.4f}",
            f"{row.perplexity / second.perplexity - 1:+.2%}",
            "-" if row.accuracy is None else f"{row.accuracy:.1%}",
            f"{row.decode_ms:.3f}",
            f"{row.decode_ms / first.decode_ms:.2f}",
        )
        for row in rows
    ]
    return aligned([heading, *cells])


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns: the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]


def _accuracy(model: Any, tokenizer: Any, tasks: Mapping[str, Sequence[Question]]) -> float | None:
    scores = [score_questions(model, tokenizer, questions).acc for questions in tasks.values()]
    return sum(scores) / len(scores) if scores else None
