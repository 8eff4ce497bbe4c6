"""Tells how a run goes: a console line per interval, metrics.jsonl, a progress bar, and optional sinks."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from megatron_prune.config.schema import Config
from megatron_prune.errors import UserError
from megatron_prune.training.console import Status, format_event, format_line
from megatron_prune.training.sinks import Sink, TensorBoardSink, WandbSink

METRICS_FILE = "metrics.jsonl"


class Reporter:
    """Reports on the main process; on all others every call does nothing.

    A record of :meth:`log` is a metrics line as it is: ``step`` (optimizer steps done), ``tokens``, ``loss``,
    ``grad_norm``, ``lr``, ``tokens_per_second``, ``mfu`` (0 to 1), ``memory_bytes``, ``parameters``, ``hidden_size``,
    ``ffn_hidden_size``, ``num_attention_heads``, ``scores`` (by type) and ``skipped``; a validation line has
    ``val_loss``. Only ``step`` must be there. JSON has no NaN and no infinity: both are written as null.

    Args:
        save_dir: run directory, made if missing; None writes no files (and has no sinks).
        config: settings of the run; ``run.wandb_project`` and ``run.tensorboard`` switch the sinks on.
        is_main: whether this process reports.
        total_steps: optimizer steps of the run, for the lines and the bar.
    """

    def __init__(self, save_dir: Path | None, config: Config, is_main: bool, total_steps: int | None) -> None:
        self._save_dir = save_dir if is_main else None
        self._config = config
        self._is_main = is_main
        self._total_steps = total_steps
        self._first_step = 0
        self._removed: collections.Counter[str] = collections.Counter()
        self._lost = False
        self._sinks: list[Sink] | None = None
        self._bar: tqdm[Any] | None = None
        if self._save_dir is not None:
            self._save_dir.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def truncate_after(self, step: int) -> None:
        """Drop the metrics of later steps, which a run resumed at ``step`` goes through again.

        Call it before the first :meth:`log`, with 0 for a run that starts anew. A line that an interrupted
        process left torn goes too, and one without a step, with a warning.

        Raises:
            OSError: the file cannot be written.
        """
        self._first_step = step
        if self._save_dir is None:
            return
        path = self._save_dir / METRICS_FILE
        if not path.exists():
            return
        kept = list(_lines_until(path, step))
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.writelines(line + b"\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def rewind(self, step: int) -> None:
        """Drop the metrics of later steps in the middle of a run, which goes back to ``step``."""
        with self._unless_full():
            self.truncate_after(step)

    def log(self, record: Mapping[str, Any], status: Status | None = None) -> None:
        """Report an interval or a validation everywhere.

        Args:
            record: a metrics line, see the class.
            status: what only the console shows.
        """
        if not self._is_main:
            return
        clean = _jsonable(record)
        if self._save_dir is not None:
            with self._unless_full():
                _append(self._save_dir / METRICS_FILE, json.dumps(clean, allow_nan=False) + "\n")
        status = dataclasses.replace(status or Status(), removed=dict(self._removed))
        self._removed.clear()
        # The console says "nan" where the file says null.
        self._say(format_line(record, status, self._total_steps), record["step"])
        self._feed_sinks(record["step"], _flat_numbers(clean))

    def event(self, record: Mapping[str, Any]) -> None:
        """Report something that happened between intervals.

        Args:
            record: ``event`` (``removal``, ``compaction``, ``export``, ...), ``step``, and details. A removal has
                ``type``; removals can be thousands, so they are counted and the next interval's line tells the sum.
        """
        if not self._is_main:
            return
        if record["event"] == "removal":
            self._removed[record["type"]] += 1
        else:
            self._say(format_event(record, self._total_steps), record["step"])

    def close(self) -> None:
        """Close files, sinks and the bar. May be called twice."""
        for sink in list(self._sinks or ()):
            self._guarded(sink, sink.close)
        self._sinks = []
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @contextlib.contextmanager
    def _unless_full(self) -> Iterator[None]:
        """A full disk costs lines of metrics, which is said once, and no training."""
        try:
            yield
        except OSError as error:
            if not self._lost:
                warn(f"{METRICS_FILE} cannot be written ({error.strerror or error}); lines are lost until it can")
            self._lost = True

    def _say(self, line: str, step: int) -> None:
        if not sys.stderr.isatty():
            print(line, flush=True)
            return
        tqdm.write(line, file=sys.stdout)
        if self._bar is None:
            self._bar = tqdm(total=self._total_steps, initial=self._first_step, unit="step", dynamic_ncols=True)
        self._bar.n = step
        self._bar.refresh()

    def _feed_sinks(self, step: int, values: Mapping[str, float]) -> None:
        if self._sinks is None:
            self._sinks = self._open_sinks()
        for sink in list(self._sinks):
            self._guarded(sink, functools.partial(sink.write, step, values))

    def _open_sinks(self) -> list[Sink]:
        if self._save_dir is None:
            return []
        save_dir, settings = self._save_dir, dataclasses.asdict(self._config)
        wanted: list[tuple[str, Callable[[], Sink]]] = []
        project = self._config.run.wandb_project
        if project is not None:
            wanted.append(("wandb", lambda: WandbSink(save_dir, project, settings)))
        if self._config.run.tensorboard:
            wanted.append(("TensorBoard", lambda: TensorBoardSink(save_dir, self._first_step + 1)))
        opened = []
        for name, make in wanted:
            try:
                opened.append(make())
            except Exception as error:  # a sink's libraries raise anything; training is worth more than a curve
                warn(f"{name} is off for this run: {type(error).__name__}: {error}")
        return opened

    def _guarded(self, sink: Sink, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # as above: warn once, go on without it
            assert self._sinks is not None
            self._sinks.remove(sink)
            warn(f"{type(sink).__name__} stopped and is dropped: {type(error).__name__}: {error}")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; a torn last line (a process died, or is just writing) is left out.

    Raises:
        UserError: the file cannot be read, or a line before the last is not a JSON object.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; restore the file") from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number} is not a JSON object ({error}); restore or delete the line") from error
        records.append(record)
    return records


def _jsonable(value: Any) -> Any:
    """Plain JSON values: zero-dimensional tensors and numpy scalars become numbers, NaN and infinities null."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if hasattr(value, "item"):
        return _jsonable(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _flat_numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a record with nested names joined by a slash, without the step."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= _flat_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and prefix + name != "step":
            flat[prefix + name] = value
    return flat


def _lines_until(path: Path, step: int) -> Iterator[bytes]:
    """Lines of metrics up to a step, as they are in the file."""
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        of = record.get("step") if isinstance(record, dict) else None
        if type(of) is int:
            if of <= step:
                yield line
        elif number < len(lines) or record is not None:  # a torn last line is nothing unusual
            warn(f"{path}:{number} is dropped: it is no object with a step")


def _append(path: Path, text: str) -> None:
    """Add to a file all of a text or nothing; raises OSError."""
    with path.open("ab", buffering=0) as file:
        size, data = file.tell(), text.encode()
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def warn(message: str) -> None:
    """Print one line of warning, beside a progress bar as well."""
    line = f"warning: {message.splitlines()[0]}"
    if sys.stderr.isatty():
        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)
