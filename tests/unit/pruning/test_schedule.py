"""Units per optimizer step, event by event."""

from __future__ import annotations

import pytest

from megatron_prune.pruning.schedule import Schedule


def events(schedule: Schedule, costs: list[int], steps: int) -> list[int]:
    """Steps at which successive groups of the given unit costs are removed."""
    spent = 0
    happened: list[int] = []
    for step in range(steps):
        while len(happened) < len(costs) and schedule.wants(step, spent):
            spent += costs[len(happened)]
            happened.append(step)
    return happened


def test_one_to_nine_prunes_every_ninth_step_from_the_start_on() -> None:
    assert events(Schedule(1, 9, start=500), [1] * 4, 600) == [500, 509, 518, 527]


def test_a_head_is_followed_by_64_units_of_waiting() -> None:
    assert events(Schedule(1, 9, start=500), [64, 1, 1], 3000) == [500, 500 + 9 * 64, 500 + 9 * 65]
    assert events(Schedule(1, 1, start=10), [1, 64, 1], 100) == [10, 11, 75]


def test_a_stem_channel_waits_two_units() -> None:
    assert events(Schedule(1, 9, start=0), [2, 2, 1], 100) == [0, 18, 36]


def test_four_to_one_takes_four_units_from_one_pass() -> None:
    assert events(Schedule(4, 1, start=3), [1] * 9, 10) == [3, 3, 3, 3, 4, 4, 4, 4, 5]
    # A stem channel may overdraw by one unit, which the next step then lacks.
    assert events(Schedule(4, 1, start=0), [1, 1, 1, 2, 1, 1, 1, 1], 10) == [0, 0, 0, 0, 1, 1, 1, 2]


def test_two_to_one_and_a_head() -> None:
    assert events(Schedule(2, 1, start=0), [1, 1, 64, 1], 100) == [0, 0, 1, 33]


def test_a_changed_pace_owes_nothing_for_the_past() -> None:
    schedule = Schedule(4, 1, start=100, spent_before=7)
    assert not schedule.wants(99, spent=7)
    assert schedule.wants(100, spent=10)
    assert not schedule.wants(100, spent=11)


@pytest.mark.parametrize(("pruning", "gradient"), [(4, 1), (2, 1), (1, 1), (1, 2), (1, 9), (3, 2)])
def test_units_and_steps_keep_the_ratio(pruning: int, gradient: int) -> None:
    schedule = Schedule(pruning, gradient, start=7)
    assert schedule.due(6) == 0
    assert schedule.due(7) == pruning
    assert schedule.due(7 + 100 * gradient - 1) == 100 * pruning
