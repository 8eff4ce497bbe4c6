"""What a run directory tells at this moment. Reads files that another process may be writing; writes nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from megatron_prune.architecture import Architecture
from megatron_prune.checkpoint.directory import SOURCE_DIR, complete_checkpoints
from megatron_prune.checkpoint.hf_source import read_architecture
from megatron_prune.config.schema import TARGET_MARK, Config
from megatron_prune.config.targets import shape_between
from megatron_prune.config.values import parse_count, parse_shape
from megatron_prune.config.yaml_file import read_yaml, with_values
from megatron_prune.errors import UserError
from megatron_prune.pruning.ledger import Event, parse_ledger
from megatron_prune.report_page.state import State, state_of
from megatron_prune.training.report import METRICS_FILE

CONFIG_FILE: Final = "config.yaml"
LEDGER_FILE: Final = "ledger.jsonl"
EXPORTS: Final = "exports"
#: Names of the three widths in metrics and ledger, by type of mini-group.
WIDTH_NAMES: Final[Mapping[str, str]] = {
    "attention": "num_attention_heads",
    "ffn": "ffn_hidden_size",
    "stem": "hidden_size",
}

#: No run has so many steps or tokens.
_BEYOND: Final = 1 << 63

Parsed = TypeVar("Parsed")


@dataclasses.dataclass(frozen=True)
class Export:
    """A snapshot of ``--export-at``, written or not.

    Attributes:
        name: the budget as it was given, or the directory's name.
        path: relative to the run directory.
        written: whether its config.json is there.
        crossed: the removal that met the budget, or None if no removal has or the name is no budget.
    """

    name: str
    path: str
    written: bool
    crossed: Event | None


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        directory: as it was given.
        training: metrics lines with a loss; ``step`` and ``tokens`` are whole numbers.
        validation: metrics lines with ``val_loss``, the same.
        events: of the ledger.
        config: settings, or None if they cannot be read.
        source: the model before pruning, or None if it cannot be read.
        checkpoints: names of those that are marked complete, oldest first.
        exports: snapshots, written and to come.
        state: whether it is running.
        notes: what a reader should know about the files.
    """

    directory: Path
    training: Sequence[Mapping[str, Any]]
    validation: Sequence[Mapping[str, Any]]
    events: Sequence[Event]
    config: Config | None
    source: Architecture | None
    checkpoints: Sequence[str]
    exports: Sequence[Export]
    state: State
    notes: Sequence[str]

    @property
    def last_step(self) -> int:
        """Steps done when the last line was written."""
        return max((line["step"] for line in (*self.training, *self.validation)), default=0)

    @property
    def last_tokens(self) -> int:
        """Tokens trained on when the last line was written."""
        return max(
            max((line["tokens"] for line in (*self.training, *self.validation)), default=0),
            self.events[-1].tokens if self.events else 0,
        )

    @property
    def num_layers(self) -> int | None:
        """Of the model."""
        if self.source is not None:
            return self.source.num_layers
        return next((len(event.removed) for event in self.events if not isinstance(event.removed, int)), None)

    def source_width(self, kind: str) -> int | None:
        """Width of an axis before the first removal, by type of mini-group."""
        name = WIDTH_NAMES[kind]
        seen = [width for line in self.training if (width := number(line.get(name))) is not None]
        if self.source is not None:
            seen.append(getattr(self.source, name))
        if self.events:
            first = self.events[0]
            if name in first.shape:
                seen.append(first.shape[name] + (first.type == kind) * first.group.size)
        return int(max(seen)) if seen else None

    @property
    def source_parameters(self) -> int | None:
        """Parameters before the first removal."""
        seen = [int(count) for line in self.training if (count := number(line.get("parameters"))) is not None]
        if self.source is not None:
            seen.append(self.source.num_parameters())
        return max(seen) if seen else None

    @property
    def parameters(self) -> int | None:
        """Parameters now."""
        if self.events and self.events[-1].tokens >= (self.training[-1]["tokens"] if self.training else 0):
            return self.events[-1].parameters
        count = number(self.training[-1].get("parameters")) if self.training else None
        return self.source_parameters if count is None else int(count)

    @property
    def target_parameters(self) -> int | None:
        """Parameters that pruning goes down to, or None without pruning, or with a target of another kind."""
        if self.config is None:
            return None
        prune = self.config.prune
        try:
            if prune.target_params is not None:
                return parse_count(prune.target_params)
            if prune.target_shape is not None and self.source is not None:
                widths = parse_shape(prune.target_shape).resolve(self.source)
                return shape_between(self.source, *widths, prune.gqa_mode).num_parameters()
        except UserError:  # settings that a run was started with have been checked; a file edited since is not worth it
            return None
        return None


def read_run(run_dir: Path) -> Run:
    """Read a run directory, of a run that is finished, stopped or going on.

    Lines that are damaged are left out and counted in the notes; a torn last line, which a running process leaves at
    any moment, is not worth a note.

    Raises:
        UserError: the directory is no run's, or a file of it cannot be read.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no directory; give the --save directory of a run")
    if not (run_dir / METRICS_FILE).is_file() and not (run_dir / CONFIG_FILE).is_file():
        raise UserError(
            f"{run_dir} has neither {CONFIG_FILE} nor {METRICS_FILE}, so it is no run; give a run's --save directory"
        )
    notes: list[str] = []
    metrics = [line for lines in _parsed(run_dir / METRICS_FILE, _metrics_line, notes) for line in lines]
    events = tuple(event for found in _parsed(run_dir / LEDGER_FILE, _ledger_line, notes) for event in found)
    training = tuple(line for line in metrics if "loss" in line)
    per_step = training[-1]["tokens"] / training[-1]["step"] if training else 0
    validation = tuple(
        {"tokens": round(line["step"] * per_step), **line} for line in metrics if number(line.get("val_loss"))
    )
    config = _settings(run_dir, notes)
    checkpoints = tuple(path.name for path in complete_checkpoints(run_dir))
    last = max((line["step"] for line in (*training, *validation)), default=0)
    return Run(
        directory=run_dir,
        training=training,
        validation=validation,
        events=events,
        config=config,
        source=_source(run_dir, notes),
        checkpoints=checkpoints,
        exports=_exports(run_dir, config, events),
        state=state_of(run_dir, last, None if config is None else config.train.train_iters),
        notes=tuple(notes),
    )


def number(value: object) -> float | None:
    """A finite number of a file that anyone may have written, or None; a whole one beyond a float's range is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def _parsed(path: Path, parse: Callable[[bytes], Parsed], notes: list[str]) -> Iterable[Parsed]:
    """What the lines of a file mean; a missing file has none."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; see that it is readable") from error
    parsed, damaged = [], 0
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            parsed.append(parse(line))
        except (ValueError, RecursionError):
            damaged += place < len(lines)  # what no line break ends is being written
    if damaged:
        lines_are = "1 damaged line is" if damaged == 1 else f"{damaged} damaged lines are"
        notes.append(f"{lines_are} left out of {path.name}")
    return parsed


def _metrics_line(content: bytes) -> list[dict[str, Any]]:
    """The line, or nothing where it is neither training nor validation. Raises ValueError if it is damaged."""
    line = json.loads(content)
    if not isinstance(line, dict) or not _is_count(line.get("step")):
        raise ValueError("no object with a step")
    if "loss" not in line and "val_loss" not in line:
        return []
    if "loss" in line and line["step"] == 0:
        raise ValueError("no step")
    if not _is_count(line.get("tokens", None if "loss" in line else 0)):
        raise ValueError("no number of tokens")
    return [line]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _BEYOND


def _ledger_line(content: bytes) -> list[Event]:
    return parse_ledger(content)


def _settings(run_dir: Path, notes: list[str]) -> Config | None:
    path = run_dir / CONFIG_FILE
    try:
        return with_values(Config(), read_yaml(str(path)))
    except UserError as error:
        notes.append(f"settings are not shown: {' '.join(str(error).split())}")
        return None


def _source(run_dir: Path, notes: list[str]) -> Architecture | None:
    try:
        return read_architecture(run_dir / SOURCE_DIR)
    except UserError as error:
        notes.append(f"the source's shape is taken from the first lines: {' '.join(str(error).split())}")
        return None


def _exports(run_dir: Path, config: Config | None, events: Sequence[Event]) -> tuple[Export, ...]:
    wanted = () if config is None else config.prune.export_at
    directory = run_dir / EXPORTS
    there = sorted(path.name for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []
    # What tools/quantize.py made of a snapshot is beside it.
    others = (name for name in there if name not in wanted and not name.startswith(".") and not name.endswith("-int8"))
    names = [*wanted, *others]
    written = {name: (directory / name / "config.json").is_file() for name in names}
    return tuple(
        Export(name, f"{EXPORTS}/{name}", written[name], _crossed(name, written[name], events)) for name in names
    )


def _crossed(name: str, written: bool, events: Sequence[Event]) -> Event | None:
    if name == TARGET_MARK and written:
        return events[-1] if events else None
    try:
        budget = parse_count(name)
    except UserError:
        return None
    return next((event for event in events if event.parameters <= budget), None)
