"""Ports for what cannot be told to take any that is free."""

from __future__ import annotations

import random
import socket

#: Below what Linux gives to connections and to listeners that ask for any port: none of those can take one meanwhile.
_PORTS = range(20_000, 32_000)


def free_port() -> int:
    """A port that nothing uses now, nor is likely to when it is opened."""
    choose = random.SystemRandom()  # forked processes, and tests that seed random, must not choose alike
    while True:
        port = choose.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
