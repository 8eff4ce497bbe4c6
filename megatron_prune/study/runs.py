"""The runs that a study consists of, what each depends on, and what makes a finished one count."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prune import __version__
from megatron_prune.checkpoint.files import sha256_file
from megatron_prune.errors import UserError
from megatron_prune.study.settings import UNIFIED, Row, Source, Study

RESULT_FILE = "result.json"
LOG_FILE = "log.txt"
_DIGITS = 16


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        study: its settings.
        source: the source model.
        row: what is done; None makes the source.
        seed: which seed; None for the source, of which there is one.
        data: hash of the text's tokens.
        root: directory of all runs.
    """

    study: Study
    source: Source
    row: Row | None
    seed: int | None
    data: str
    root: Path

    @property
    def key(self) -> str:
        """Name of the run, and of its directory below the study's."""
        return f"{self.source.name}/source" if self.row is None else f"{self.source.name}/{self.row.name}/{self.seed}"

    @property
    def directory(self) -> Path:
        """Where it writes."""
        return self.root / self.key

    @property
    def needs(self) -> tuple[Run, ...]:
        """The runs that have to be finished before it."""
        if self.row is None:
            return ()
        needed = [dataclasses.replace(self, row=None, seed=None)]
        if self.row.needs_search:
            needed.append(self.searching)
        return tuple(needed)

    @property
    def searching(self) -> Run:
        """The run that finds the searched shape for this one."""
        return dataclasses.replace(self, row=self.study.rows[UNIFIED])

    @property
    def settings(self) -> dict[str, Any]:
        """Flags of the trainer, without those that name places or shapes."""
        settings = dict(self.study.settings)
        if self.row is None:
            return settings | dict(self.source.settings)
        if self.row.goal != "none":
            settings |= self.study.pruning
        settings["seed"] = self.seed
        if self.row.alone:
            # The first step is taken after the pruned model is written; at this rate it changes next to nothing.
            settings |= {"few_shot_samples": self.few_shot_samples, "train_iters": 1, "lr_warmup_iters": 0}
        return settings | dict(self.row.settings)

    @property
    def few_shot_samples(self) -> int:
        """As many calibration samples as row ``few-shot`` takes."""
        row = self.study.rows.get("few-shot")
        return 128 if row is None else int(row.settings["few_shot_samples"])

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides the result: settings, text, code version, and the runs it builds on."""
        row = None if self.row is None else dataclasses.asdict(self.row)
        beside = {"rows", "budget"} if self.row is None else {"rows"}
        source = {name: value for name, value in dataclasses.asdict(self.source).items() if name not in beside}
        facts: Mapping[str, Any] = {
            "version": __version__,
            "data": self.data,
            "split": self.study.split,
            "evaluation": dataclasses.asdict(self.study.evaluation),
            "settings": self.settings,
            "source": source,
            "weights": {} if self.source.path is None else weight_hashes(Path(self.source.path)),
            "row": row,
            "needs": [run.fingerprint for run in self.needs],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_DIGITS]

    @property
    def work(self) -> float:
        """About how much there is to do, in units of one small model's step: for estimates of the time left."""
        width = 128 if self.source.shape is None else self.source.shape["hidden_size"]
        batch = self.settings.get("global_batch_size", 1) / self.study.settings.get("global_batch_size", 1)
        return 150 + self.settings["train_iters"] * batch * (width / 64) ** 1.3

    def result(self) -> dict[str, Any] | None:
        """The finished run's result, if there is one of these very settings."""
        try:
            record: dict[str, Any] = json.loads((self.directory / RESULT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if record.get("fingerprint") == self.fingerprint else None


@functools.cache
def weight_hashes(directory: Path) -> Mapping[str, str]:
    """Name and sha256 of every file of weights in a given source's directory: another model is another study."""
    return {path.name: sha256_file(path) for path in sorted(directory.glob("*.safetensors"))}


def all_runs(study: Study, data: str, root: Path) -> list[Run]:
    """Every run, in an order in which each comes after those it needs."""
    runs = []
    for source in study.sources.values():
        runs.append(Run(study, source, None, None, data, root))
        names = sorted(source.rows, key=lambda name: name != UNIFIED)
        runs += [Run(study, source, study.rows[name], seed, data, root) for name in names for seed in study.seeds]
    return runs


def chosen_runs(runs: Sequence[Run], only: Sequence[str]) -> list[Run]:
    """The runs whose key begins with one of some words, ``small/unified`` say, and what they need.

    Raises:
        UserError: a word that no key begins with.
    """
    for word in only:
        if not any(run.key.startswith(word) for run in runs):
            raise UserError(f"--only {word} is no run; they are named SOURCE/ROW/SEED, as {runs[-1].key}")
    wanted = {run.key for run in runs if any(run.key.startswith(word) for word in only)}
    wanted |= {need.key for run in runs if run.key in wanted for need in run.needs}
    wanted |= {need.key for run in runs if run.key in wanted for need in run.needs}  # what those need in turn
    return [run for run in runs if not only or run.key in wanted]
