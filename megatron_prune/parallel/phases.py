"""What a process is doing, and which of many processes keeps the others waiting."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

STALL_SECONDS = 600.0  # a third of what collectives wait for each other
_BEATS = 10  # reports within that time
_NAMED = 4

_PACKAGE = str(Path(__file__).parents[1])
_COLLECTIVES = "/torch/distributed/"


@dataclasses.dataclass(frozen=True)
class Phase:
    """Part of a run that all processes go through in the same order.

    Attributes:
        sequence: number of phases entered before; equal on all processes that are equally far.
        name: for users.
        step: optimizer step, or None where there is none yet.
        since: when it was entered, on the clock of its :class:`Phases`.
    """

    sequence: int
    name: str
    step: int | None
    since: float

    def __str__(self) -> str:
        return f"`{self.name}`" + ("" if self.step is None else f" of step {self.step}")


class Phases:
    """The phase of this process: written by its main thread, read by its watch.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.current = Phase(0, "loading", None, clock())

    def enter(self, name: str, step: int | None = None) -> None:
        """Begin a phase, which ends with the next one."""
        self.current = Phase(self.current.sequence + 1, name, step, self._clock())

    @contextlib.contextmanager
    def inside(self, name: str, step: int | None = None) -> Iterator[None]:
        """A phase within another one."""
        around = self.current
        self.enter(name, step)
        yield
        self.enter(around.name, around.step)

    def report(self) -> Report:
        """The phase, for how long, and where the main thread is."""
        phase = self.current
        place, waiting = _main_thread()
        return Report(phase.sequence, str(phase), self._clock() - phase.since, place, waiting)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a process says of itself.

    Attributes:
        sequence: of the phase.
        phase: for users.
        seconds: spent in it.
        place: line of ours that the main thread is at.
        waiting: the main thread waits for other processes, as far as Python can see.
    """

    sequence: int
    phase: str
    seconds: float
    place: str
    waiting: bool


class Doubling:
    """When to say something that goes on: at a limit, then at twice the time, and so on.

    Args:
        limit: seconds.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._next = limit

    def due(self, seconds: float) -> bool:
        """True when it has gone on for long enough to be said, again perhaps."""
        if seconds < self._limit:
            self._next = self._limit
        if seconds < self._next:
            return False
        self._next = 2 * seconds
        return True


class Stalls:
    """Finds the processes that keep the others waiting, from what all report.

    Processes report while a phase lasts longer than a beat. One that does not, while another has been in the same phase
    for long, is stopped or its interpreter is; otherwise it is one that is behind, or that waits for nobody.

    Args:
        limit: seconds in a phase before anything is said.
        clock: seconds, monotonic.
    """

    def __init__(self, limit: float = STALL_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._begun = clock()
        self._heard: dict[int, tuple[float, Report]] = {}
        self._doubling = Doubling(limit)

    def heard(self, rank: int, report: Report) -> None:
        """A process has reported."""
        self._heard[rank] = (self._clock(), report)

    def line(self, names: Mapping[int, str]) -> str | None:
        """What is to be said now, if anything.

        Args:
            names: of the processes that are there, by rank.
        """
        ages = {rank: self._age(rank) for rank in sorted(names)}
        beat = beat_seconds(self._limit)
        reports = {rank: self._heard[rank][1] for rank in ages if ages[rank] < 2 * beat and rank in self._heard}
        if not reports or not self._doubling.due(max(report.seconds for report in reports.values())):
            return None
        silent = [rank for rank in ages if ages[rank] >= 3 * beat]
        if silent:
            causes = [f"{names[rank]} has said nothing for {ages[rank]:.0f} s{self._last(rank)}" for rank in silent]
        else:
            late = self._late(reports)
            if not late:
                return f"note: no rank has gone on for {self._limit:.0f} s: {_places(reports)}"
            causes = [f"{names[rank]} has been in {_told(reports.pop(rank))}" for rank in late]
        (others, _), *_ = collections.Counter(report.phase for report in reports.values()).most_common(1)
        return f"note: {_some(causes)} while the others wait in {others}"

    def _late(self, reports: Mapping[int, Report]) -> list[int]:
        """Ranks that wait for nobody while others wait; else those that are behind."""
        busy = {rank: report for rank, report in reports.items() if not report.waiting}
        if busy and len(busy) < len(reports):
            last = min(report.sequence for report in busy.values())
            return [rank for rank, report in busy.items() if report.sequence == last]
        front = max(report.sequence for report in reports.values())
        return [rank for rank, report in reports.items() if report.sequence < front]

    def _age(self, rank: int) -> float:
        """Seconds since the last report of a rank, or since the beginning."""
        return self._clock() - (self._heard[rank][0] if rank in self._heard else self._begun)

    def _last(self, rank: int) -> str:
        return f" since {self._heard[rank][1].phase}" if rank in self._heard else ""


def beat_seconds(limit: float) -> float:
    """Seconds between two reports of a process that is long in a phase."""
    return limit / _BEATS


def _told(report: Report) -> str:
    return f"{report.phase} for {report.seconds:.0f} s ({report.place})"


def _places(reports: Mapping[int, Report]) -> str:
    ranks: dict[str, list[str]] = {}
    for rank, report in reports.items():
        ranks.setdefault(_told(report), []).append(str(rank))
    return _some([f"rank(s) {_some(numbers)} in {told}" for told, numbers in ranks.items()])


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:_NAMED]) + (f" and {len(words) - _NAMED} more" if len(words) > _NAMED else "")


def _main_thread() -> tuple[str, bool]:
    """The innermost line of this package on the main thread's stack, and whether a collective is on it."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    place, innermost, waiting = "", "", False
    while frame is not None:
        file = frame.f_code.co_filename
        here = f"{Path(file).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        innermost = innermost or here
        waiting = waiting or _COLLECTIVES in file
        if not place and file.startswith(_PACKAGE):
            place = here
        frame = frame.f_back
    return place or innermost, waiting
