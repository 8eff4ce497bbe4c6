"""Asked to stop: by a signal or by the clock. The loop polls; nothing is interrupted half-way."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Remembers the first stop signal, and a deadline.

    A second Ctrl-C ends the process at once, as a user expects.

    Args:
        minutes: time limit from now on, or None.
        clock: seconds, monotonic.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deadline = None if minutes is None else clock() + 60 * minutes
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def reason(self) -> str | None:
        """Why this process should stop, or None."""
        if self._received is not None:
            return signal.Signals(self._received).name
        if self._deadline is not None and self._clock() >= self._deadline:
            return "the time limit"
        return None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            signal.default_int_handler(number, frame)
        if self._received is None:
            self._received = number
