"""Scores as a row of the paper's table, beside its published rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from megatron_prune.evaluation.harness import Scores
from megatron_prune.evaluation.published import COLUMNS, COMMON_SENSE, MMLU, published_near

AVERAGE: Final = "Avg."
_NAME_WIDTH: Final = 26
_SHARES: Final = ("acc", "exact_match", "f1")  # how names of measures begin that are fractions of one


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


def plain_rows(scores: Scores, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """For tasks that are not the paper's: every measure by name, each by task with its average over the tasks that
    have it. Shares of right answers are in percent, other measures as lm-eval gives them."""
    found = {task: scores.tasks[task] for task in tasks}
    measures = dict.fromkeys(name for values in found.values() for name in values if "_stderr" not in name)
    rows = {}
    for measure in measures:
        factor = 100 if measure.startswith(_SHARES) else 1
        row = {task: factor * values[measure] for task, values in found.items() if measure in values}
        rows[measure] = row | {AVERAGE: sum(row.values()) / len(row)}
    return rows


def plain_table(name: str, rows: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> list[str]:
    """A line for each measure, under the names of the tasks."""
    return table([(f"{name} {measure}", row) for measure, row in rows.items()], (*tasks, AVERAGE))


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
    first = max([_NAME_WIDTH, *(len(name) for name, _ in rows)])
    widths = [max(len(column), len("00.00")) + 2 for column in columns]
    lines = [
        name.ljust(first) + "".join(cell.rjust(width) for cell, width in zip(numbers, widths, strict=True))
        for name, *numbers in cells
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
