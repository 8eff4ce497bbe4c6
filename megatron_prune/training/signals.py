"""Asked to stop: by a signal, the clock or a file. The loop polls; nothing is interrupted half-way."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from megatron_prune.errors import StopRequested

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
#: In the run directory.
STOP_FILE = "stop"


class StopRequest:
    """Remembers the first stop signal, and knows a deadline and a file that asks as well.

    A second Ctrl-C ends the process at once, as a user expects.

    Args:
        minutes: time limit from now on, or None.
        file: asks to stop once it exists, and is removed when that is done.
        is_last: the process ends after a stop. The signals are then ignored from the moment they are no longer
            remembered: launchers terminate the other ranks once one has left, and would report the signal instead of
            the exit code. Otherwise the handlers of before come back.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        minutes: float | None,
        file: Path | None = None,
        *,
        is_last: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._deadline = None if minutes is None else clock() + 60 * minutes
        self._file = file
        self._is_last = is_last
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ignored = self._is_last and isinstance(error, StopRequested)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if ignored else handler)

    @property
    def reason(self) -> str | None:
        """Why this process should stop, or None."""
        if self._received is not None:
            return signal.Signals(self._received).name
        if self._deadline is not None and self._clock() >= self._deadline:
            return "the time limit"
        if self._file is not None and self._file.is_file():
            return f"the file {self._file}"
        return None

    def obeyed(self) -> None:
        """Everything is saved: remove the file, so that a run which is started again goes on."""
        if self._file is not None:
            with contextlib.suppress(
                OSError
            ):  # if it stays, the next start stops at once and says why: nothing is lost
                self._file.unlink(missing_ok=True)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            signal.default_int_handler(number, frame)
        if self._received is None:
            self._received = number
