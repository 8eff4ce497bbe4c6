"""Stop requests: remembered, not acted upon."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_prune.training.signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest(None) as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == number.name
    assert signal.getsignal(number) == before


def test_a_second_interrupt_interrupts() -> None:
    with StopRequest(None), pytest.raises(KeyboardInterrupt):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_the_clock_is_a_reason() -> None:
    now = [100.0]
    stop = StopRequest(2.0, clock=lambda: now[0])
    now[0] = 219.9
    assert stop.reason is None
    now[0] = 220.0
    assert stop.reason == "the time limit"
