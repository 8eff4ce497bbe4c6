"""When one process of a job is lost, all of them end at once and say which one it was.

Every process keeps one idle TCP connection to rank 0. The kernel closes it when a process dies, however it dies; rank 0
reads the end of the stream, on whatever host and under whatever launcher, and tells the others. If rank 0 dies,
everyone reads that. Heartbeats would need a limit that no pause may exceed; here a pause cannot look like a death (a
checkpoint, a compaction, a build that holds the interpreter's lock), because nothing has to be sent to be alive. A host
that vanishes without closing anything is noticed by TCP keepalive, which kernels answer, not threads.

Collectives are no substitute: gloo raises "Connection closed by peer" without saying whose, and NCCL waits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

from megatron_prune.errors import EXIT_BAD_INPUT, EXIT_FAILURE, MegatronPruneError, StopRequested, UserError
from megatron_prune.parallel.phases import STALL_SECONDS, Doubling, Phases, beat_seconds
from megatron_prune.parallel.relay import JOIN_SECONDS, Line, Relay, keep_alive, listen_anywhere, say

SILENCE_SECONDS = 40  # until a host that vanished is given up; with what follows below a minute
PATIENCE_SECONDS = 5.0
GRACE_SECONDS = 15.0
_KEY = "rank 0"
_LONGEST_SUMMARY = 4096  # characters, well within what the relay takes for a line


class Meeting(Protocol):
    """The part of :class:`torch.distributed.Store` by which processes find rank 0."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...


def watch_peers(meeting: Meeting | None, phases: Phases) -> contextlib.AbstractContextManager[object]:
    """A watch over the processes of this job, to be entered once all have joined; nothing for a job of one.

    Args:
        meeting: the store of :func:`~megatron_prune.parallel.join.joined`, used by this thread alone.
        phases: what this process is doing.
    """
    if meeting is None:
        return contextlib.nullcontext()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return PeerWatch(rank, world_size, meeting, os.environ["MASTER_ADDR"], phases=phases)


class PeerWatch:
    """Ends this process when another one dies or fails; tells the others when this one fails.

    On a normal end, and on :class:`StopRequested`, the process takes its leave and its threads end. On an error of its
    own it tells the others, who name it, and goes on to report the error; should it then hang, as the teardown of a
    communicator may, it is ended. An error that is not ours may be the echo of a peer's death, so the watch first waits
    for news of one.

    While this process is long in one phase its watch reports so to rank 0, which names those that keep the others
    waiting; rank 1 looks after rank 0. That ends nothing: a slow disk may recover.

    Args:
        rank: of this process. Rank 0 relays, and is watching once all have joined.
        world_size: number of processes.
        store: where rank 0 says how it is reached.
        address: rank 0's host, as the other hosts know it.
        phases: what this process is doing.
        where: names this process to users; by default its host and pid.
        silence: seconds after which a host that answers nothing, not even keepalive probes, is given up.
        patience: seconds for which an unexpected error waits for news of a peer's death.
        grace: seconds that a failed process has to end by itself.
        stall: seconds after which a phase is worth a word.
        end: ends the process with an exit code.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Meeting,
        address: str,
        *,
        phases: Phases | None = None,
        where: str | None = None,
        silence: float = SILENCE_SECONDS,
        patience: float = PATIENCE_SECONDS,
        grace: float = GRACE_SECONDS,
        stall: float = STALL_SECONDS,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._store = store
        self._address = address
        self._phases = phases or Phases()
        self._where = where or f"{socket.gethostname()} (pid {os.getpid()})"
        self._silence = silence
        self._patience = patience
        self._grace = grace
        self._stall = stall
        self._end = end
        self._reported: int | None = None
        self._unanswered: float | None = None
        self._doubling = Doubling(stall)
        self._leaving = threading.Event()
        self._failing = threading.Event()
        self._news = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> PeerWatch:
        self._line, self._where_is_main = self._open_relay() if self._rank == 0 else self._reach_relay()
        self._start(self._listen, "peer-watch")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, StopRequested):
            self._leaving.set()
            self._line.send(bye=True)
            self._line.end()
            for thread in self._threads:
                thread.join()
            return
        unexpected = isinstance(error, Exception) and not isinstance(error, MegatronPruneError)
        if unexpected and self._news.wait(self._patience):
            self._threads[-1].join()  # it ends the process
            return
        self._failing.set()
        summary = str(error) if isinstance(error, MegatronPruneError) else f"{type(error).__name__}: {error}"
        code = EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILURE
        self._line.send(failed=" ".join(summary.split())[:_LONGEST_SUMMARY], code=code)
        self._news.wait(self._patience)  # until it is passed on: with rank 0's process the relay would end

    def _start(self, run: Callable[[], None], name: str) -> None:
        self._threads.append(threading.Thread(target=run, name=name, daemon=True))
        self._threads[-1].start()

    def _open_relay(self) -> tuple[Line, str]:
        """Rank 0: listen, say where, and wait until everyone is there. Its own watch joins like all others."""
        listener = listen_anywhere()
        mine, relays = socket.socketpair()
        token = secrets.token_hex()
        relay = Relay(listener, relays, self._where, token, self._silence, self._stall)
        place = {"port": listener.getsockname()[1], "token": token, "where": self._where}
        self._start(relay.run, "peer-watch-relay")
        self._store.set(_KEY, json.dumps(place))
        relay.await_ranks(self._world_size)
        return Line(mine), self._where

    def _reach_relay(self) -> tuple[Line, str]:
        place = json.loads(self._store.get(_KEY))
        try:
            connection = socket.create_connection((self._address, place["port"]), timeout=JOIN_SECONDS)
        except OSError as error:
            raise UserError(
                f"rank {self._rank} cannot reach rank 0 at {self._address}:{place['port']} ({error}): MASTER_ADDR must "
                "be rank 0's host and the nodes must let each other's ports through, which gloo and NCCL need as well"
            ) from error
        connection.settimeout(None)
        keep_alive(connection, self._silence)
        line = Line(connection)
        line.send(hello=place["token"], rank=self._rank, where=self._where)
        return line, place["where"]

    def _listen(self) -> None:
        """Wait for news and say what this process is doing, for as long as it lives."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._line, selectors.EVENT_READ)
            while True:
                if not selector.select(beat_seconds(self._stall)):
                    self._report()
                elif (messages := self._line.receive()) is None:
                    break
                elif self._read(messages):
                    return
        self._line.close()
        if not self._leaving.is_set():
            self._obey(f"rank 0 on {self._where_is_main} died", EXIT_FAILURE, failed=False)

    def _read(self, messages: Sequence[dict[str, Any]]) -> bool:
        """Act on messages; True when no more will come."""
        for message in messages:
            if "heard" in message:
                self._unanswered = None
            elif "bye" in message:  # rank 0 has finished: there is nobody left to ask
                self._line.close()
                return True
            elif "verdict" in message:
                self._obey(message["verdict"], message["code"], message["failed"])
                return True
        return False

    def _report(self) -> None:
        """Tell rank 0 of a long phase, and once more when the next one has begun."""
        report = self._phases.report()
        if report.seconds < beat_seconds(self._stall) and self._reported in (None, report.sequence):
            return
        self._reported = report.sequence if report.seconds >= beat_seconds(self._stall) else None
        self._line.send(report=dataclasses.asdict(report))
        self._unanswered = self._unanswered or time.monotonic()
        silence = time.monotonic() - self._unanswered
        if self._doubling.due(silence) and self._rank == 1:
            name = f"rank 0 on {self._where_is_main}"
            say(f"note: {name} has said nothing for {silence:.0f} s while rank 1 is in {report.phase}")

    def _obey(self, verdict: str, code: int, failed: bool) -> None:
        self._news.set()
        if failed:  # often all ranks make the same mistake at the same step: let each report its own
            self._failing.wait(self._patience / 2)
        if self._failing.is_set():
            self._leaving.wait(self._grace)
        elif not self._leaving.is_set():
            advice = "" if failed else "; start again to resume from the last checkpoint"
            say(f"error: {verdict}; all ranks stop{advice}")
        if not self._leaving.is_set():
            self._end(code)
