"""Stop requests: remembered, not acted upon."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megatron_prune.errors import StopRequested
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


def test_the_file_is_a_reason_until_it_is_obeyed(tmp_path: Path) -> None:
    stop = StopRequest(None, tmp_path / "stop")
    assert stop.reason is None
    stop.obeyed()
    (tmp_path / "stop").touch()
    assert stop.reason == f"the file {tmp_path / 'stop'}"
    stop.obeyed()
    assert stop.reason is None


def test_a_stop_without_a_file_removes_none() -> None:
    StopRequest(None).obeyed()


@pytest.mark.parametrize("is_last", [True, False])
def test_a_launcher_s_signal_cannot_change_the_exit_code(is_last: bool) -> None:
    """Once signals are no longer remembered, in a process that ends; any other gets its handlers back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with pytest.raises(StopRequested), StopRequest(None, is_last=is_last):
            raise StopRequested("stopped")
        after = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        assert after == (dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN) if is_last else before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_error_gives_the_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="x"), StopRequest(None, is_last=True):
        raise ValueError("x")
    assert signal.getsignal(signal.SIGTERM) == before
