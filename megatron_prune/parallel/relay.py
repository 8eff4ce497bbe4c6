"""Rank 0's half of the watch over peers: a thread that every process has a line to."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
from collections.abc import Mapping
from typing import Any

from megatron_prune.errors import EXIT_FAILURE, MegatronPruneError
from megatron_prune.parallel.phases import Report, Stalls, beat_seconds

JOIN_SECONDS = 60.0
_PROBES = 4
_STDERR = 2
_LONGEST_LINE = 1 << 16  # bytes; ours are a few hundred
_HELLO = {"rank": int, "where": str}
_REPORT = {"sequence": int, "phase": str, "seconds": float, "place": str, "waiting": bool}
_FAILED = {"failed": str, "code": int}


class Relay:
    """Knows every process by its connection, passes the first bad news on to all, and says who keeps whom waiting.

    Args:
        listener: where the others connect.
        mine: the connection of rank 0's own watch.
        where: names rank 0.
        token: what a connection must begin with to be believed.
        silence: seconds after which a host that answers nothing, not even keepalive probes, is given up.
        stall: seconds after which a phase is worth a word.
    """

    def __init__(
        self, listener: socket.socket, mine: socket.socket, where: str, token: str, silence: float, stall: float
    ) -> None:
        self._listener = listener
        self._token = token
        self._silence = silence
        self._main = Line(mine)
        self._names = {self._main: f"rank 0 on {where}"}
        self._rank_of = {self._main: 0}
        self._stalls = Stalls(stall)
        self._beat = beat_seconds(stall)
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
            if not self._joined.wait_for(lambda: len(self._ranks) == world_size, JOIN_SECONDS):
                missing = ", ".join(str(rank) for rank in sorted(set(range(world_size)) - self._ranks))
                raise MegatronPruneError(f"not heard of within {JOIN_SECONDS:.0f} s of the start: rank(s) {missing}")

    def run(self) -> None:
        """Relay until rank 0 takes its leave, or the process ends."""
        with selectors.DefaultSelector() as selector, self._listener:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._main, selectors.EVENT_READ, self._main)
            while not self._finished:
                for key, _ in selector.select(self._beat):
                    line = key.data
                    if line is None:
                        self._accept(selector)
                        continue
                    messages = line.receive()
                    if messages is None or not all(self._heard(line, message) for message in messages):
                        self._lost(selector, line)
                self._look_for_stalls()
            for key in selector.get_map().values():
                if key.data is not None:
                    key.data.send(bye=True)
                    key.data.close()

    def _look_for_stalls(self) -> None:
        line = self._stalls.line({self._rank_of[line]: name for line, name in self._names.items()})
        if line is not None and self._verdict is None:
            say(line)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        with contextlib.suppress(OSError):  # whoever connected may be gone already
            connection, _ = self._listener.accept()
            keep_alive(connection, self._silence)
            line = Line(connection)
            selector.register(line, selectors.EVENT_READ, line)

    def _lost(self, selector: selectors.BaseSelector, line: Line) -> None:
        selector.unregister(line)
        line.close()
        name = self._names.pop(line, None)
        if name is not None:
            self._decide(f"{name} died", EXIT_FAILURE, failed=False)
        self._finished = self._finished or line is self._main

    def _heard(self, line: Line, message: dict[str, Any]) -> bool:
        """Act on a message; what is malformed changes nothing. False if it comes from a stranger."""
        report: Any = message.get("report")
        if message.get("hello") == self._token and _has(message, _HELLO):
            self._names[line] = f"rank {message['rank']} on {message['where']}"
            self._rank_of[line] = message["rank"]
            with self._joined:
                self._ranks.add(message["rank"])
                self._joined.notify()
            if self._verdict is not None:
                line.send(**self._verdict)
        elif line not in self._names:
            return False
        elif "bye" in message:
            del self._names[line]
            self._finished = self._finished or line is self._main
        elif _has(report, _REPORT):
            self._stalls.heard(self._rank_of[line], Report(**{name: report[name] for name in _REPORT}))
            line.send(heard=True)
        elif _has(message, _FAILED):
            self._decide(f"{self._names[line]} failed: {message['failed']}", message["code"], failed=True)
        return True

    def _decide(self, verdict: str, code: int, failed: bool) -> None:
        """The first news is the cause; what follows are its consequences."""
        if self._verdict is None:
            self._verdict = {"verdict": verdict, "code": code, "failed": failed}
            for line in reversed(self._names):  # rank 0 last, which may be waiting for this to end its process
                line.send(**self._verdict)


class Line:
    """Messages over a socket, one JSON object a line."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._unread = b""
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        """Send one message. A peer that is gone is no error: its end of the stream says so."""
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Wait for bytes; the messages that they complete, or None when there will be no more.

        A line that is no JSON object gives an empty message. One without an end is not waited for.
        """
        try:
            received = self._socket.recv(4096)
        except OSError:
            return None
        if not received:
            return None
        *whole, self._unread = (self._unread + received).split(b"\n")
        return None if len(self._unread) > _LONGEST_LINE else [_message(text) for text in whole]

    def end(self) -> None:
        """Send no more, and wake a thread that waits for messages."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()


def _message(text: bytes) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):  # a stranger on the port speaks something else
        return {}
    return message if isinstance(message, dict) else {}


def _has(message: Any, fields: Mapping[str, type]) -> bool:
    """True for an object with these fields, each of its very type."""
    return isinstance(message, dict) and all(type(message.get(name)) is kind for name, kind in fields.items())


def keep_alive(connection: socket.socket, silence: float) -> None:
    """Have the kernel probe an idle connection and end it after ``silence`` seconds without an answer."""
    interval = max(1, round(silence / (2 * _PROBES)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(silence / 2)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)


def listen_anywhere() -> socket.socket:
    """A listening socket on all addresses, IPv6 as well where the machine has it."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # built in, but switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=4096)


def say(line: str) -> None:
    """Print on stderr in one write, past the buffer that the main thread may hold: lines of processes do not mix."""
    with contextlib.suppress(OSError):  # whoever read it may be gone
        os.write(_STDERR, f"{line}\n".encode())
