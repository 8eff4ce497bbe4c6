from __future__ import annotations

import math

from megatron_prune.pruning.ledger import Event
from megatron_prune.training.guard import WINDOW, jumped, remembered, spiked, usual_score


def event(number: int, ffn: float, stem: float = 1.0) -> Event:
    return Event(number, number, 0, "ffn", [0], {"ffn": ffn, "stem": stem, "attention": 1.0}, {}, 0)


def test_a_spike_is_measured_against_its_own_type() -> None:
    events = [event(number, ffn=1.0, stem=50.0) for number in range(1, 20)]
    assert spiked("ffn", 5.0, events, 4.9)
    assert not spiked("ffn", 5.0, events, 5.0)
    assert not spiked("stem", 99.0, events, 4.9)
    assert not spiked("ffn", 5.0, events, None)


def test_a_spike_needs_something_usual() -> None:
    assert not spiked("ffn", 5.0, [event(number, ffn=1.0) for number in range(1, 8)], 2.0)
    assert spiked("ffn", 5.0, [event(number, ffn=1.0) for number in range(1, 9)], 2.0)


def test_what_is_usual_changes_with_the_run() -> None:
    events = [event(number, ffn=1.0) for number in range(50)] + [event(50 + number, ffn=4.0) for number in range(17)]
    assert usual_score("ffn", events) == 4.0
    assert not spiked("ffn", 5.0, events, 2.0)


def test_a_jump_of_the_loss() -> None:
    recent = [2.0] * 9
    assert jumped(2.6, recent, 0.5)
    assert not jumped(2.5, recent, 0.5)
    assert jumped(math.nan, recent, 0.5)
    assert not jumped(99.0, recent, None)
    assert not jumped(99.0, recent[:7], 0.5)


def test_losses_are_remembered_as_long_as_they_count() -> None:
    recent: tuple[float, ...] = ()
    for loss in range(WINDOW + 5):
        recent = remembered(float(loss), recent)
    assert recent == tuple(float(loss) for loss in range(5, WINDOW + 5))
    assert remembered(math.inf, recent) == recent
