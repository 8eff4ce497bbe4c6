"""All processes of a job find each other, within a short time, before anything that could wait for half an hour.

Each one signs in at the rendezvous store of MASTER_ADDR and MASTER_PORT; rank 0 looks who has come and says so to all.
A process that failed while it read its input is then named to the others, and until all have come signals end a process
as they end any other: nothing is there yet that could be saved.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch.distributed as dist

from megatron_prune.errors import MegatronPruneError, PeersMissingError, UserError

#: Between the first process that is ready and the last.
JOIN_SECONDS = 120.0
_FAREWELL_SECONDS = 5.0
_POLL_SECONDS = (0.02, 0.5)  # at first, at last: thousands of processes may ask
_VERDICT = "missing"


@contextlib.contextmanager
def joined(limit: float = JOIN_SECONDS) -> Iterator[dist.Store | None]:
    """The store of a job whose processes have all come; on leaving, the process group made meanwhile is destroyed.

    Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. A job of one process needs no store and gets None.

    Args:
        limit: seconds to wait for the others.

    Raises:
        PeersMissingError: some process did not come.
        UserError: rank 0 did not, or cannot be reached.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = None
    if world_size > 1:
        # torchrun keeps its own store when it starts the processes again: the last attempt's entries must not be found.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = Arrivals(rank, world_size, address, port, attempt, limit).meet(is_host)
    try:
        yield store
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Arrivals:
    """One process's way to the others.

    Args:
        rank: of this process.
        world_size: number of processes.
        address: of the store.
        port: of the store.
        attempt: distinguishes starts that share a store.
        limit: seconds to wait for the others.
    """

    def __init__(self, rank: int, world_size: int, address: str, port: int, attempt: str, limit: float) -> None:
        self._rank = rank
        self._world_size = world_size
        self._address = address
        self._port = port
        self._attempt = attempt
        self._limit = limit

    def meet(self, is_host: bool) -> dist.Store:
        """Wait until all are there.

        Args:
            is_host: this process keeps the store; otherwise rank 0 or the launcher does.

        Returns:
            The store, with a prefix of this start's own.
        """
        store = self._host() if is_host else self._reach()
        try:
            store.set(self._here(self._rank), "")
            missing = self._look_around(store) if self._rank == 0 else self._ask(store)
        except dist.DistError as error:
            raise MegatronPruneError(f"rank 0 at {self._place()} has ended while the others were joining") from error
        if missing:
            numbers = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise PeersMissingError(
                f"rank(s) {numbers} of {self._world_size} never arrived at {self._place()} within {self._limit:.0f} s: "
                "see their own output, and check that every node starts the same number of processes and reaches that "
                "address"
            )
        return store

    def _host(self) -> dist.Store:
        try:
            store = dist.TCPStore("0.0.0.0", self._port, is_master=True, timeout=self._timeout, wait_for_workers=False)
        except dist.DistError as error:
            raise UserError(
                f"port {self._port} cannot be opened on {socket.gethostname()} (another job's, perhaps): "
                "start with another MASTER_PORT"
            ) from error
        return self._own(store)

    def _reach(self) -> dist.Store:
        problem = ""

        def listens() -> bool:
            nonlocal problem
            try:
                socket.create_connection((self._address, self._port), timeout=self._limit).close()
            except OSError as error:
                problem = str(error)
                return False
            return True

        # Not left to the store, which would keep a Ctrl-C waiting and fill the terminal with its attempts.
        if not _poll(listens, self._limit):
            raise self._no_rank_0(problem)
        try:
            store = dist.TCPStore(self._address, self._port, is_master=False, timeout=self._timeout)
        except dist.DistError as error:
            raise self._no_rank_0(" ".join(str(error).split()[:12])) from error
        return self._own(store)

    def _look_around(self, store: dist.Store) -> list[int]:
        """Rank 0: the ranks that have not come in time, which all others are told."""
        awaited = set(range(self._world_size))

        def complete() -> bool:
            awaited.difference_update([rank for rank in awaited if store.check([self._here(rank)])])
            return not awaited

        _poll(complete, self._limit)
        store.set(_VERDICT, json.dumps(sorted(awaited)))
        if awaited:  # the store may end with this process: let those who came read
            there = [rank for rank in range(1, self._world_size) if rank not in awaited]
            _poll(lambda: not there or store.check([self._heard(rank) for rank in there]), _FAREWELL_SECONDS)
        return sorted(awaited)

    def _ask(self, store: dist.Store) -> list[int]:
        """The other ranks: what rank 0 says, its time running from when it came itself."""
        if not _poll(lambda: store.check([self._here(0)]), self._limit):
            raise self._no_rank_0("it has not come")
        if not _poll(lambda: store.check([_VERDICT]), self._limit + _FAREWELL_SECONDS):
            raise self._no_rank_0("it came and went")
        missing: list[int] = json.loads(store.get(_VERDICT))
        store.set(self._heard(self._rank), "")
        return missing

    def _no_rank_0(self, problem: str) -> UserError:
        return UserError(
            f"no rank 0 at {self._place()} within {self._limit:.0f} s ({problem}): see its own output, and check that "
            "MASTER_ADDR is its host and that every node reaches it"
        )

    def _own(self, store: dist.Store) -> dist.Store:
        return dist.PrefixStore(f"megatron-prune {self._attempt}", store)

    @property
    def _timeout(self) -> timedelta:
        return timedelta(seconds=self._limit)

    def _place(self) -> str:
        return f"{self._address}:{self._port}"

    @staticmethod
    def _here(rank: int) -> str:
        return f"here {rank}"

    @staticmethod
    def _heard(rank: int) -> str:
        return f"heard {rank}"


def _poll(condition: Callable[[], bool], limit: float) -> bool:
    """Wait for a condition, in Python so that signals are obeyed; False when the time is over."""
    pause, longest = _POLL_SECONDS
    deadline = time.monotonic() + limit
    while not condition():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(2 * pause, longest)
    return True
