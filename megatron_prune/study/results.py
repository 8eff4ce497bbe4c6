"""The results of a study: one file of small records, and the mean and spread of a number over the seeds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_prune.errors import UserError
from megatron_prune.study.runs import Run
from megatron_prune.study.settings import Study
from megatron_prune.training.run_dir import replace_text

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Spread:
    """A number over the seeds.

    Attributes:
        values: one a seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return sum(self.values) / len(self.values)

    @property
    def deviation(self) -> float:
        """Their sample standard deviation; 0 for a single one."""
        if len(self.values) < 2:
            return 0.0
        return math.sqrt(sum((value - self.mean) ** 2 for value in self.values) / (len(self.values) - 1))

    def text(self, digits: int = 3) -> str:
        """Mean and deviation, ``3.142 ± 0.015``."""
        return f"{self.mean:.{digits}f} ± {self.deviation:.{digits}f}"

    def apart(self, other: Spread) -> bool:
        """True if every value of one lies above every value of the other, and there are more than one of each."""
        if min(len(self.values), len(other.values)) < 2:
            return False
        return min(self.values) > max(other.values) or min(other.values) > max(self.values)


@dataclasses.dataclass(frozen=True)
class Results:
    """What ``results.json`` holds.

    Attributes:
        facts: of the study as a whole: seeds, settings, tasks, budgets and what else the page tells.
        records: one for each run, as its ``result.json``.
    """

    facts: dict[str, Any]
    records: tuple[dict[str, Any], ...]

    def of(self, source: str, row: str | None) -> list[dict[str, Any]]:
        """The records of a row, one a seed in their order; of the source itself without a row. Empty if not run."""
        return [record for record in self.records if (record["source"], record["row"]) == (source, row)]

    def spread(self, source: str, row: str | None, number: Callable[[dict[str, Any]], float | None]) -> Spread | None:
        """A number of a row's records; None where the row was not run or one of them has no such number."""
        values = [number(record) for record in self.of(source, row)]
        present = [value for value in values if value is not None]
        return Spread(tuple(present)) if present and len(present) == len(values) else None

    def sources(self) -> list[str]:
        """Names of the sources, in the study's order."""
        return list(self.facts["sources"])


def loss(stage: str) -> Callable[[dict[str, Any]], float | None]:
    """The held-out loss of a record at a stage, ``pruned`` or ``final``."""
    return lambda record: record["models"].get(stage, {}).get("val_loss")


def accuracy(stage: str, task: str | None = None, kind: str = "acc") -> Callable[[dict[str, Any]], float | None]:
    """Per cent of right answers of a record at a stage, in one task or their mean."""

    def number(record: dict[str, Any]) -> float | None:
        shares = record["models"].get(stage, {}).get(kind)
        if shares is None:
            return None
        return 100 * (sum(shares.values()) / len(shares) if task is None else shares[task])

    return number


def collect(study: Study, runs: Sequence[Run]) -> Results:
    """Gather the results of finished runs; the removals, which only pictures need, of the first seed alone.

    Raises:
        UserError: one has none.
    """
    records = []
    for run in runs:
        record = run.result()
        if record is None:
            raise UserError(f"{run.key} has no result of these settings; run the study again")
        left_out = {"fingerprint"} if run.seed in (None, study.seeds[0]) else {"fingerprint", "events"}
        records.append({name: value for name, value in record.items() if name not in left_out})
    sources = {}
    for name, source in study.sources.items():
        given = "given" if source.path is not None else "trained by the study"
        sources[name] = {"budget": source.budget, "made": given}
    facts = {
        "format": FORMAT,
        "seeds": list(study.seeds),
        "settings": dict(study.settings),
        "pruning": dict(study.pruning),
        "split": study.split,
        "evaluation": dataclasses.asdict(study.evaluation),
        "sources": sources,
        "rows": {name: dict(row.settings) for name, row in study.rows.items()},
    }
    return Results(facts, tuple(records))


def write_results(results: Results, path: Path) -> None:
    """Write them as JSON, a record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(record, sort_keys=True) for record in results.records)
    replace_text(path, f'{{"facts": {json.dumps(results.facts, sort_keys=False)},\n"records": [\n{lines}\n]}}\n')


def read_results(path: Path) -> Results:
    """Read them.

    Raises:
        UserError: there is no such file, or it is none of these.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        facts, records = content["facts"], content["records"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no results of a study ({error}); make study writes them") from error
    if facts.get("format") != FORMAT:
        raise UserError(f"{path} has results of format {facts.get('format')!r}, not {FORMAT}; run the study again")
    return Results(facts, tuple(records))
