"""What the benchmarks share: measuring several callables in turn, paired ratios with their quartiles, tables and JSON.

A machine speeds up and slows down while it measures. The callables of one measurement therefore take turns, round by
round, and two of them are compared by the ratio within each round, never by two medians taken at different times.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

SECONDS_TO_MS = 1e3
#: A benchmark that needs what this machine has not got ends with this status: neither success nor a failure.
EXIT_UNAVAILABLE = 2

#: What may stand in a cell of a table.
Cell = str | int | float


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles of one quantity over the rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __format__(self, spec: str) -> str:
        """``median (low .. high)``, each number with the given format, e.g. ``.2f``."""
        return f"{self.median:{spec}} ({self.low:{spec}} .. {self.high:{spec}})"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of each callable in each round, by name; entry i of every list is of the same round."""

    seconds: Mapping[str, Sequence[float]]

    def median_ms(self, name: str) -> float:
        """Median time of one callable, in milliseconds."""
        return statistics.median(self.seconds[name]) * SECONDS_TO_MS

    def spread_ms(self, name: str) -> Spread:
        """Median and quartiles of the time of one callable, in milliseconds."""
        return Spread.of([seconds * SECONDS_TO_MS for seconds in self.seconds[name]])

    def ratio(self, numerator: str, denominator: str) -> Spread:
        """The time of one callable over that of another within each round: paired, so that the machine cancels."""
        pairs = zip(self.seconds[numerator], self.seconds[denominator], strict=True)
        return Spread.of([above / below for above, below in pairs])

    def with_least(self, name: str, among: Sequence[str]) -> Measured:
        """The same with one entry more: in each round the least of several, e.g. of several ways to a floor."""
        least = [min(times) for times in zip(*(self.seconds[one] for one in among), strict=True)]
        return Measured({**self.seconds, name: least})


def measure(
    callables: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    synchronize: Callable[[], object] | None = None,
) -> Measured:
    """Time several callables in turn.

    Args:
        callables: by name. Every other round takes them in reverse, so that none always follows the same neighbour.
        rounds: how many times each is timed, at least 1.
        warmup: rounds before these that do not count: they allocate, compile and fill caches.
        synchronize: called before and after each, e.g. ``torch.cuda.synchronize``; None for work on the CPU.
    """
    if rounds < 1:
        raise ValueError(f"{rounds} rounds measure nothing")
    wait = synchronize or _nothing
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    order = list(callables)
    for index in range(warmup + rounds):
        for name in order if index % 2 == 0 else reversed(order):
            wait()
            began = time.perf_counter()
            callables[name]()
            wait()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return Measured(seconds)


def synchronizer(device: torch.device) -> Callable[[], object] | None:
    """What ``measure`` must call to wait for a device; None for the CPU."""
    return torch.cuda.synchronize if device.type == "cuda" else None


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Cell | Spread]], digits: int = 2) -> None:
    """Print rows under their headings: the first column to the left, all others to the right.

    Args:
        columns: headings.
        rows: one cell for each heading; floats and spreads are printed with ``digits`` decimals.
        digits: decimals.
    """
    table = [list(columns), *([_cell(cell, digits) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        first, *others = (
            f"{cell:<{width}}" if index == 0 else f"{cell:>{width}}"
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip(), flush=True)


def add_common_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add ``--rounds`` and ``--json FILE``.

    Args:
        parser: of the benchmark.
        rounds: the default number of rounds.
    """
    parser.add_argument(
        "--rounds", type=positive_int, default=rounds, help="measurements of each (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def machine() -> dict[str, Cell]:
    """What the numbers of a run belong to: versions, threads, processor and the instructions of our kernels."""
    facts: dict[str, Cell] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": _processor()}
    facts |= {"cores": os.cpu_count() or 1, "instructions": _instructions()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def describe_machine() -> str:
    """:func:`machine` in one line, for the head of a table."""
    return ", ".join(f"{key} {value}" for key, value in machine().items())


def write_json(
    path: Path | None, benchmark: str, columns: Sequence[str], rows: Sequence[Sequence[Cell | Spread]]
) -> None:
    """Write a table as ``{"benchmark", "machine", "rows": [{column: value}]}``; a spread becomes an object of three.

    Args:
        path: None writes nothing.
        benchmark: its name.
        columns: keys of the rows.
        rows: as for :func:`print_table`.
    """
    if path is None:
        return
    records = [dict(zip(columns, map(_plain, row), strict=True)) for row in rows]
    document = {"benchmark": benchmark, "machine": machine(), "rows": records}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def verdict(value: float, least: float | None = None, most: float | None = None) -> str:
    """What a number is held to, and whether it is: e.g. ``>= 1.2 met``; empty without a bound."""
    bounds = [f">= {least:g}"] if least is not None else []
    bounds += [f"<= {most:g}"] if most is not None else []
    if not bounds:
        return ""
    met = (least is None or value >= least) and (most is None or value <= most)
    return f"{', '.join(bounds)} {'met' if met else 'MISSED'}"


def _nothing() -> None:
    """The wait of work that is done when its call returns."""


def _cell(cell: Cell | Spread, digits: int) -> str:
    return f"{cell:.{digits}f}" if isinstance(cell, float | Spread) else str(cell)


def _plain(cell: Cell | Spread) -> object:
    return dataclasses.asdict(cell) if isinstance(cell, Spread) else cell


def _instructions() -> str:
    """As ``python -m megatron_prune.ops`` says it; torch comes first, so that the two share one OpenMP runtime."""
    try:
        return str(importlib.import_module("megatron_prune._C").info()["isa"])
    except ImportError:
        return "kernels not built"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in names if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor() or platform.machine()
