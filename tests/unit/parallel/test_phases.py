"""Who keeps whom waiting, told from reports; a clock that the tests move."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import Any

from megatron_prune.parallel.phases import Doubling, Phases, Report, Stalls, beat_seconds

LIMIT = 600.0
NAMES = {rank: f"rank {rank} on host-{rank}" for rank in range(4)}


class Cluster:
    """Four ranks that report at every beat."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.stalls = Stalls(LIMIT, lambda: self.now)

    def go_on(self, seconds: float, reports: dict[int, Report]) -> list[str]:
        """Let time pass while these ranks stay where they are; the lines that are said meanwhile."""
        begun, lines = self.now, []
        while self.now < begun + seconds:
            self.now += beat_seconds(LIMIT)
            for rank, report in reports.items():
                self.stalls.heard(rank, dataclasses.replace(report, seconds=report.seconds + self.now - begun))
            line = self.stalls.line(NAMES)
            lines += [] if line is None else [line]
        return lines


def at(phase: str, sequence: int = 7, waiting: bool = True, place: str = "x.py:1 in f") -> Report:
    return Report(sequence, phase, 0.0, place, waiting)


def test_a_rank_that_is_behind_is_named() -> None:
    reports = {rank: at("`next step` of step 120", 8) for rank in range(4)}
    reports[3] = at("`saving a checkpoint` of step 120", 7, waiting=False, place="store.py:9 in write")
    (line,) = Cluster().go_on(LIMIT, reports)
    assert line == (
        "note: rank 3 on host-3 has been in `saving a checkpoint` of step 120 for 600 s (store.py:9 in write) "
        "while the others wait in `next step` of step 120"
    )


def test_of_those_in_one_phase_the_busy_one_is_named() -> None:
    """A rank may be behind because it waits for the one that is stuck."""
    reports = {0: at("`b`", 8), 1: at("`a`", 7), 2: at("`a`", 7, waiting=False), 3: at("`a`", 7)}
    (line,) = Cluster().go_on(LIMIT, reports)
    assert line.startswith("note: rank 2 on host-2 has been in `a` for 600 s")
    assert "rank 1" not in line


def test_without_a_sign_of_waiting_the_last_one_is_named() -> None:
    """The others wait for their GPUs, which Python cannot see."""
    reports = {rank: at("`b`", 8, waiting=False) for rank in range(3)} | {3: at("`a`", 7, waiting=False)}
    (line,) = Cluster().go_on(LIMIT, reports)
    assert line.startswith("note: rank 3 on host-3 has been in `a` for 600 s")


def test_a_rank_that_reports_nothing_is_named() -> None:
    cluster = Cluster()
    cluster.go_on(120, {rank: at("`training step` of step 4", 5) for rank in range(4)})
    (line,) = cluster.go_on(LIMIT, {rank: at("`training step` of step 5", 7) for rank in (0, 2, 3)})
    assert line.startswith(
        "note: rank 1 on host-1 has said nothing for 600 s since `training step` of step 4 while the"
    )


def test_where_all_are_the_same_their_places_are_told() -> None:
    reports = {rank: at("`a`", waiting=False, place="engine.py:1 in step") for rank in range(3)}
    reports[3] = at("`a`", waiting=False, place="indexed.py:2 in read")
    (line,) = Cluster().go_on(LIMIT, reports)
    assert line == (
        "note: no rank has gone on for 600 s: rank(s) 0, 1, 2 in `a` for 600 s (engine.py:1 in step), "
        "rank(s) 3 in `a` for 600 s (indexed.py:2 in read)"
    )


def test_it_is_said_rarely_and_again_for_the_next_stall() -> None:
    cluster = Cluster()
    reports = {0: at("`b`", 8), 1: at("`a`", 7, waiting=False)} | {rank: at("`b`", 8) for rank in (2, 3)}
    assert len(cluster.go_on(7 * LIMIT, reports)) == 3, "after 1, 2 and 4 times the limit"
    assert not cluster.go_on(LIMIT / 2, {rank: at("`c`", 9) for rank in range(4)})
    assert len(cluster.go_on(LIMIT, reports)) == 1


def test_nothing_is_said_of_a_job_that_goes_on() -> None:
    cluster = Cluster()
    for step in range(5):
        assert not cluster.go_on(LIMIT - 60, {rank: at("`a`", step, waiting=rank > 0) for rank in range(4)})
    assert not cluster.go_on(10 * LIMIT, {}), "phases shorter than a beat are not reported"


def test_doubling() -> None:
    doubling = Doubling(10)
    assert [seconds for seconds in range(100) if doubling.due(seconds)] == [10, 20, 40, 80]
    assert [seconds for seconds in range(25) if doubling.due(seconds)] == [10, 20]


def test_phases_nest_and_are_numbered() -> None:
    now = [5.0]
    phases = Phases(lambda: now[0])
    assert str(phases.current) == "`loading`"
    with phases.inside("training step", 3):
        with phases.inside("decision", 3):
            now[0] = 7.5
            report = phases.report()
        assert str(phases.current) == "`training step` of step 3"
    assert (report.sequence, report.phase, report.seconds) == (2, "`decision` of step 3", 2.5)
    assert (phases.current.sequence, phases.current.name) == (4, "loading")
    assert Report(**json.loads(json.dumps(dataclasses.asdict(report)))) == report


def test_a_main_thread_in_a_collective_waits() -> None:
    """Seen from another thread, as the watch sees it."""
    entered, seen, reports = threading.Event(), threading.Event(), list[Report]()
    scope: dict[str, Any] = {}
    body = "def all_reduce(entered, seen):\n    entered.set()\n    seen.wait()\n"
    exec(compile(body, "/site-packages/torch/distributed/distributed_c10d.py", "exec"), scope)

    def look() -> None:
        entered.wait()
        reports.append(Phases().report())
        seen.set()

    looking = threading.Thread(target=look)
    looking.start()
    scope["all_reduce"](entered, seen)
    looking.join()
    assert reports[0].waiting
    assert not Phases().report().waiting
    assert "phases.py" in Phases().report().place, "the innermost line of the package"
