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
import json
import os
import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol

import torch.distributed as dist

from megatron_prune.errors import EXIT_BAD_INPUT, EXIT_FAILURE, MegatronPruneError, StopRequested, UserError

SILENCE_SECONDS = 40  # until a host that vanished is given up; with what follows below a minute
PATIENCE_SECONDS = 5.0
GRACE_SECONDS = 15.0
_PROBES = 4
_JOIN_SECONDS = 60.0
_KEY = "rank 0"
_STDERR = 2


class Meeting(Protocol):
    """The part of :class:`torch.distributed.Store` by which processes find rank 0."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...


def watch_peers() -> contextlib.AbstractContextManager[object]:
    """A watch over the processes of this job, to be entered once all have joined; nothing for a job of one.

    The meeting place is a connection of its own to the rendezvous of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT,
    which exists under every launcher: a store object may be used by one thread at a time only.
    """
    if int(os.environ["WORLD_SIZE"]) == 1:
        return contextlib.nullcontext()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_JOIN_SECONDS))
    # torchrun keeps its store when it starts the processes again: the last attempt's entry must not be found.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    meeting = dist.PrefixStore(f"peer watch {attempt}", store)
    return PeerWatch(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), meeting, address)


class PeerWatch:
    """Ends this process when another one dies or fails; tells the others when this one fails.

    On a normal end, and on :class:`StopRequested`, the process takes its leave and its threads end. On an error of its
    own it tells the others, who name it, and goes on to report the error; should it then hang, as the teardown of a
    communicator may, it is ended. An error that is not ours may be the echo of a peer's death, so the watch first waits
    for news of one.

    Args:
        rank: of this process. Rank 0 relays, and is watching once all have joined.
        world_size: number of processes.
        store: where rank 0 says how it is reached.
        address: rank 0's host, as the other hosts know it.
        where: names this process to users; by default its host and pid.
        silence: seconds after which a host that answers nothing, not even keepalive probes, is given up.
        patience: seconds for which an unexpected error waits for news of a peer's death.
        grace: seconds that a failed process has to end by itself.
        end: ends the process with an exit code.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Meeting,
        address: str,
        *,
        where: str | None = None,
        silence: float = SILENCE_SECONDS,
        patience: float = PATIENCE_SECONDS,
        grace: float = GRACE_SECONDS,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._store = store
        self._address = address
        self._where = where or f"{socket.gethostname()} (pid {os.getpid()})"
        self._silence = silence
        self._patience = patience
        self._grace = grace
        self._end = end
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
        self._line.send(failed=" ".join(summary.split()), code=code)
        self._news.wait(self._patience)  # until it is passed on: with rank 0's process the relay would end

    def _start(self, run: Callable[[], None], name: str) -> None:
        self._threads.append(threading.Thread(target=run, name=name, daemon=True))
        self._threads[-1].start()

    def _open_relay(self) -> tuple[_Line, str]:
        """Rank 0: listen, say where, and wait until everyone is there. Its own watch joins like all others."""
        listener = _listen_anywhere()
        mine, relays = socket.socketpair()
        token = secrets.token_hex()
        relay = _Relay(listener, relays, self._where, token, self._silence)
        place = {"port": listener.getsockname()[1], "token": token, "where": self._where}
        self._start(relay.run, "peer-watch-relay")
        self._store.set(_KEY, json.dumps(place))
        relay.await_ranks(self._world_size)
        return _Line(mine), self._where

    def _reach_relay(self) -> tuple[_Line, str]:
        place = json.loads(self._store.get(_KEY))
        try:
            connection = socket.create_connection((self._address, place["port"]), timeout=_JOIN_SECONDS)
        except OSError as error:
            raise UserError(
                f"rank {self._rank} cannot reach rank 0 at {self._address}:{place['port']} ({error}): MASTER_ADDR must "
                "be rank 0's host and the nodes must let each other's ports through, which gloo and NCCL need as well"
            ) from error
        connection.settimeout(None)
        keep_alive(connection, self._silence)
        line = _Line(connection)
        line.send(hello=place["token"], rank=self._rank, where=self._where)
        return line, place["where"]

    def _listen(self) -> None:
        """Wait for news, for as long as the process lives."""
        while (messages := self._line.receive()) is not None:
            for message in messages:
                if "bye" in message:  # rank 0 has finished: there is nobody left to ask
                    self._line.close()
                    return
                self._obey(message["verdict"], message["code"], message["failed"])
                return
        self._line.close()
        if not self._leaving.is_set():
            self._obey(f"rank 0 on {self._where_is_main} died", EXIT_FAILURE, failed=False)

    def _obey(self, verdict: str, code: int, failed: bool) -> None:
        self._news.set()
        if failed:  # often all ranks make the same mistake at the same step: let each report its own
            self._failing.wait(self._patience / 2)
        if self._failing.is_set():
            self._leaving.wait(self._grace)
        elif not self._leaving.is_set():
            advice = "" if failed else "; start again to resume from the last checkpoint"
            with contextlib.suppress(OSError):  # whoever read it may be gone
                # In one write, past the buffer that the main thread may hold: lines of several processes do not mix.
                os.write(_STDERR, f"error: {verdict}; all ranks stop{advice}\n".encode())
        if not self._leaving.is_set():
            self._end(code)


class _Relay:
    """Rank 0's half: knows every process by its connection, and passes the first bad news on to all.

    Args:
        listener: where the others connect.
        mine: the connection of rank 0's own watch.
        where: names rank 0.
        token: what a connection must begin with to be believed.
        silence: as in :class:`PeerWatch`.
    """

    def __init__(self, listener: socket.socket, mine: socket.socket, where: str, token: str, silence: float) -> None:
        self._listener = listener
        self._token = token
        self._silence = silence
        self._main = _Line(mine)
        self._names = {self._main: f"rank 0 on {where}"}
        self._verdict: dict[str, Any] | None = None
        self._finished = False
        self._ranks = {0}
        self._joined = threading.Condition()

    def await_ranks(self, world_size: int) -> None:
        """Wait, on another thread, until every rank has joined.

        Raises:
            MegatronPruneError: some have not; they are named.
        """
        with self._joined:
            if not self._joined.wait_for(lambda: len(self._ranks) == world_size, _JOIN_SECONDS):
                missing = ", ".join(str(rank) for rank in sorted(set(range(world_size)) - self._ranks))
                raise MegatronPruneError(f"not heard of within {_JOIN_SECONDS:.0f} s of the start: rank(s) {missing}")

    def run(self) -> None:
        """Relay until rank 0 takes its leave, or the process ends."""
        with selectors.DefaultSelector() as selector, self._listener:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._main, selectors.EVENT_READ, self._main)
            while not self._finished:
                for key, _ in selector.select():
                    if key.data is None:
                        self._accept(selector)
                    elif (messages := key.data.receive()) is None:
                        self._lost(selector, key.data)
                    else:
                        for message in messages:
                            self._heard(key.data, message)
            for key in selector.get_map().values():
                if key.data is not None:
                    key.data.send(bye=True)
                    key.data.close()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        connection, _ = self._listener.accept()
        keep_alive(connection, self._silence)
        line = _Line(connection)
        selector.register(line, selectors.EVENT_READ, line)

    def _lost(self, selector: selectors.BaseSelector, line: _Line) -> None:
        selector.unregister(line)
        line.close()
        name = self._names.pop(line, None)
        if name is not None:
            self._decide(f"{name} died", EXIT_FAILURE, failed=False)
        self._finished = self._finished or line is self._main

    def _heard(self, line: _Line, message: dict[str, Any]) -> None:
        if message.get("hello") == self._token:
            self._names[line] = f"rank {message['rank']} on {message['where']}"
            with self._joined:
                self._ranks.add(message["rank"])
                self._joined.notify()
            if self._verdict is not None:
                line.send(**self._verdict)
        elif line not in self._names:
            return  # a stranger
        elif "bye" in message:
            del self._names[line]
            self._finished = self._finished or line is self._main
        else:
            self._decide(f"{self._names[line]} failed: {message['failed']}", message["code"], failed=True)

    def _decide(self, verdict: str, code: int, failed: bool) -> None:
        """The first news is the cause; what follows are its consequences."""
        if self._verdict is None:
            self._verdict = {"verdict": verdict, "code": code, "failed": failed}
            for line in reversed(self._names):  # rank 0 last, which may be waiting for this to end its process
                line.send(**self._verdict)


class _Line:
    """Messages over a socket, one JSON object a line."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._unread = b""

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        """Send one message. A peer that is gone is no error: its end of the stream says so."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Wait for bytes; the messages that they complete, or None when there will be no more."""
        try:
            received = self._socket.recv(4096)
        except OSError:
            return None
        if not received:
            return None
        *whole, self._unread = (self._unread + received).split(b"\n")
        messages = []
        for text in whole:
            with contextlib.suppress(ValueError):  # a stranger on the port speaks something else
                messages.append(json.loads(text))
        return [message for message in messages if isinstance(message, dict)]

    def end(self) -> None:
        """Send no more, and wake a thread that waits for messages."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()


def keep_alive(connection: socket.socket, silence: float) -> None:
    """Have the kernel probe an idle connection and end it after ``silence`` seconds without an answer."""
    interval = max(1, round(silence / (2 * _PROBES)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(silence / 2)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)


def _listen_anywhere() -> socket.socket:
    """A listening socket on all addresses, IPv6 as well where the machine has it."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # built in, but switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=4096)
