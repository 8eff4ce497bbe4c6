"""Scores as a row of the paper's table, beside its published rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from megatron_prune.evaluation.harness import Scores
from megatron_prune.evaluation.published import COLUMNS, COMMON_SENSE, MMLU, published_near

AVERAGE: Final = "Avg."
_NAME_WIDTH: Final = 26


def paper_row(scores: Scores) -> dict[str, float]:
    """Percent by column, ``MMLU`` first if it was scored; the average only of all seven tasks, as in the paper."""
    row = {}
    if MMLU[0] in scores.tasks:
        row["MMLU"] = 100 * scores.tasks[MMLU[0]][MMLU[1]]
    seven = {
        column: 100 * scores.tasks[task][measure]
        for column, (task, measure) in COMMON_SENSE.items()
        if task in scores.tasks
    }
    row |= seven
    if len(seven) == len(COMMON_SENSE):
        row[AVERAGE] = sum(seven.values()) / len(seven)
    return row


def plain_row(scores: Scores) -> dict[str, float]:
    """Percent of ``acc`` by task and their average, for tasks that are not the paper's."""
    row = {name: 100 * values["acc"] for name, values in scores.tasks.items() if "acc" in values}
    return row | ({AVERAGE: sum(row.values()) / len(row)} if row else {})


def paper_table(name: str, row: Mapping[str, float], parameters: int) -> list[str]:
    """The row under the table's heading, then published rows of models of similar size."""
    published = []
    for entry in published_near(parameters):
        mmlu = {} if entry.mmlu is None else {"MMLU": entry.mmlu}
        published.append((entry.model, mmlu | dict(zip(COLUMNS, entry.scores, strict=True))))
    columns = (*(("MMLU",) if "MMLU" in row else ()), *COLUMNS)
    lines = table([(name, row), *published], columns)
    if published:
        lines.insert(3, "as published by the paper (Tables 3 and 4), with another version of the harness:")
    return lines


def table(rows: Sequence[tuple[str, Mapping[str, float]]], columns: Sequence[str]) -> list[str]:
    """Aligned lines: a heading, a rule, the rows; a dash where there is no number."""
    cells = [("model", *columns), *((name, *(_percent(row.get(column)) for column in columns)) for name, row in rows)]
    first = max(_NAME_WIDTH, *(len(name) for name, _ in rows))
    widths = [max(len(column), len("00.00")) + 2 for column in columns]
    lines = [
        name.ljust(first) + "".join(cell.rjust(width) for cell, width in zip(numbers, widths, strict=True))
        for name, *numbers in cells
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
