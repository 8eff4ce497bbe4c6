"""The paper's zero-shot tables: which tasks and measures they hold, and their rows, copied as published."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

#: Column of the paper's tables -> task of lm-eval and the measure reported. The paper names neither; tasks are those of
#: its lm-eval version (0.4.3), and length is normalised where the works it compares with do so.
COMMON_SENSE: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "ARC-c": ("arc_challenge", "acc_norm"),
        "ARC-e": ("arc_easy", "acc"),
        "BoolQ": ("boolq", "acc"),
        "HellaSwag": ("hellaswag", "acc_norm"),
        "OBQA": ("openbookqa", "acc_norm"),
        "PIQA": ("piqa", "acc"),
        "WinoGrande": ("winogrande", "acc"),
    }
)
#: Cloze form: the likelihood of whole answers. The paper took it from Lighteval 0.7.0, whose prompts differ.
MMLU: Final = ("mmlu_continuation", "acc")
COLUMNS: Final = (*COMMON_SENSE, "Avg.")
_NEAR: Final = 2.0  # times more or fewer parameters


@dataclasses.dataclass(frozen=True)
class PublishedRow:
    """One row.

    Attributes:
        model: as named, with training tokens, or with its pruning ratio.
        parameters: in millions.
        scores: percent, in the order of ``COLUMNS``.
        mmlu: percent, or None where the table has no such column.
    """

    model: str
    parameters: float
    scores: tuple[float, ...]
    mmlu: float | None = None


def published_near(parameters: int) -> list[PublishedRow]:
    """Rows of Table 4, or of Table 3 beyond its sizes, of models of a similar number of parameters."""
    rows = [*_rows(_TABLE_4, has_mmlu=True), *_rows(_TABLE_3, has_mmlu=False)]
    return [row for row in rows if 1 / _NEAR <= row.parameters * 1e6 / parameters <= _NEAR]


def _rows(table: str, has_mmlu: bool) -> list[PublishedRow]:
    """Each line: name | millions of parameters | scores."""
    rows = []
    for line in table.strip().splitlines():
        name, millions, numbers = line.split("|")
        scores: Sequence[float] = [float(number) for number in numbers.split()]
        mmlu = scores[0] if has_mmlu else None
        rows.append(PublishedRow(name.strip(), float(millions), tuple(scores[has_mmlu:]), mmlu))
    return rows


#: Parameters as in the table's own column.
_TABLE_4: Final = """
Pythia-160M 300B | 162 | 26.43 22.27 37.84 43.33 29.97 26.40 58.87 49.96 38.38
Mamba-130M 1.2T | 130 | 27.65 24.49 47.56 54.68 35.11 29.00 64.69 53.35 44.13
MobileLLM-125M 1T | 125 | 27.58 24.32 46.38 60.34 38.15 28.40 65.13 52.41 45.02
SmolLM-135M 600B | 135 | 30.05 29.35 61.32 59.85 42.67 34.40 68.55 52.96 49.87
EfficientLLM-134M 500B | 134 | 30.54 30.97 62.88 60.40 43.81 33.60 68.82 53.28 50.54
Pythia-410M 300B | 405 | 29.10 24.15 51.39 59.20 40.20 29.40 66.70 53.83 46.41
MobileLLM-350M 1T | 345 | 30.21 27.39 56.40 61.96 49.51 31.00 68.88 57.14 50.33
SmolLM-360M 600B | 362 | 33.89 36.26 70.16 55.23 53.51 37.60 71.38 57.22 54.48
Qwen2-0.5B 15T | 494 | 31.85 28.50 55.05 61.25 49.16 32.80 69.75 57.22 50.53
Qwen2.5-0.5B 17T | 494 | 33.37 32.17 64.44 61.99 52.09 35.20 70.29 56.20 53.20
EfficientLLM-457M 50B | 457 | 33.09 35.92 70.50 59.85 53.16 35.00 72.69 56.27 54.77
EfficientLLM-457M 500B | 457 | 34.54 38.40 72.10 62.42 56.84 40.40 73.83 57.46 57.35
Pythia-1B 300B | 1000 | 30.14 26.96 56.86 60.04 47.15 31.20 70.29 52.88 49.34
TinyLlama-1.1B 3T | 1100 | 32.30 30.29 60.40 56.85 59.13 35.80 73.07 59.04 53.51
ShearedLlama-1.3B 50B | 1300 | 31.51 29.44 61.07 61.83 59.33 34.40 73.94 58.01 54.00
OLMo-1B 2T | 1200 | 32.03 30.72 63.55 61.38 62.86 36.40 75.35 59.35 55.66
Llama3.2-1B | 1200 | 36.31 31.48 65.28 63.88 63.69 37.40 74.59 60.54 56.69
EfficientLLM-1.1B 50B | 1100 | 36.71 40.36 73.61 62.39 60.24 40.20 75.19 61.25 59.03
EfficientLLM-1.1B 320B | 1100 | 37.71 42.24 73.48 67.09 64.09 41.80 75.41 61.17 60.75
"""
#: Pruned from Llama-7B, whose 6.7 billion parameters less the ratio give the second column, which the table lacks. The
#: paper evaluated the first ratio with lm-eval 0.3.0.
_TABLE_3: Final = """
MaP 50 %, tuned | 3370 | 30.63 49.32 39.69 42.49 31.40 66.81 50.67 44.43
MvP 50 %, tuned | 3370 | 26.79 44.07 59.94 40.98 31.80 63.06 55.64 46.04
WANDA 50 %, tuned | 3370 | 34.20 42.68 50.90 38.12 38.78 57.38 55.98 45.43
LLM-Pruner 50 %, tuned | 3370 | 28.24 46.46 61.47 47.56 35.20 68.82 55.09 48.98
LoRAPrune 50 %, tuned | 3370 | 31.62 45.13 61.88 47.86 34.98 71.53 55.01 49.72
LoRAShear 50 %, tuned | 3370 | 32.26 47.68 62.12 48.01 34.61 71.80 56.29 50.40
Compresso 50 %, tuned | 3370 | 27.82 48.82 60.09 39.31 33.40 66.70 51.93 46.87
NutePrune 50 % | 3370 | 31.74 46.59 62.20 53.87 35.80 69.91 57.77 51.13
NutePrune 50 %, tuned | 3370 | 32.17 51.68 62.26 55.88 34.40 71.00 57.54 52.13
EfficientLLM 50 % | 3370 | 30.80 52.15 62.29 54.70 35.20 71.33 56.75 51.89
EfficientLLM 50 %, tuned | 3370 | 34.04 64.81 64.83 60.12 34.60 73.88 61.48 56.25
LLM-Pruner 70 %, tuned | 2020 | 24.83 39.56 47.28 31.66 28.80 60.83 50.75 40.53
NutePrune 70 %, tuned | 2020 | 26.19 42.17 62.08 39.43 30.20 62.30 51.46 44.83
EfficientLLM 70 % | 2020 | 27.73 54.50 47.89 47.77 31.00 68.17 55.17 47.46
EfficientLLM 70 %, tuned | 2020 | 29.95 58.59 58.13 52.02 34.60 70.08 55.96 51.33
"""
