"""Ranks that come, ranks that do not: what the others say, and how soon."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Event

import pytest
import torch.distributed as dist
from ports import free_port

from megatron_prune.errors import MegatronPruneError, PeersMissingError, UserError
from megatron_prune.parallel import join
from megatron_prune.parallel.join import Arrivals, joined

LIMIT_SECONDS = 2.0  # for tests in which somebody is waited for in vain
TIMEOUT_SECONDS = 60.0


def arrive(
    ranks: Sequence[int],
    world_size: int,
    host: int | None = 0,
    port: int = 0,
    attempt: str = "0",
    limit: float = LIMIT_SECONDS,
) -> dict[int, object]:
    """These ranks, as threads of this process, arrive; gives each one's store or error."""
    ends: dict[int, object] = {}
    port = port or free_port()

    def come(rank: int) -> None:
        try:
            ends[rank] = Arrivals(rank, world_size, "127.0.0.1", port, attempt, limit).meet(rank == host)
        except MegatronPruneError as error:
            ends[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
    return ends


def test_all_arrive() -> None:
    ends = arrive([2, 0, 1], 3, limit=TIMEOUT_SECONDS)
    assert all(isinstance(end, dist.Store) for end in ends.values()), ends


def test_all_know_who_is_missing() -> None:
    ends = arrive([0, 2], 4)
    for end in ends.values():
        assert isinstance(end, PeersMissingError)
        assert str(end).startswith("rank(s) 1, 3 of 4 never arrived at 127.0.0.1:")
        assert "within 2 s" in str(end)
    assert len(ends) == 2


def test_many_missing_ranks_are_one_line() -> None:
    (end,) = arrive([0], 100).values()
    assert str(end).startswith("rank(s) 1, 2, 3, 4, 5, 6, 7, 8 and 91 more of 100 never arrived")


def test_without_rank_0_the_others_say_so() -> None:
    """It keeps the store, as under srun and deepspeed."""
    ends = arrive([1, 2], 3)
    for end in ends.values():
        assert isinstance(end, UserError)
        assert "no rank 0 at 127.0.0.1:" in str(end)
        assert "refused" in str(end)
    assert len(ends) == 2


def test_without_rank_0_at_the_launcher_s_store() -> None:
    """The store is there, rank 0 is not, as under torchrun; nor does it count that it came to an earlier attempt."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first = arrive([0, 1], 2, None, store.port, limit=TIMEOUT_SECONDS)
    assert all(isinstance(end, dist.Store) for end in first.values()), first
    (end,) = arrive([1], 2, None, store.port, attempt="1").values()
    assert isinstance(end, UserError)
    assert "it has not come" in str(end)


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        (end,) = arrive([0], 2, 0, port).values()
    assert isinstance(end, UserError)
    assert f"port {port} cannot be opened" in str(end)


def test_a_job_of_one_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with joined() as store:
        assert store is None


def wait_alone(port: int, begun: Event) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background is born deaf to it
    begun.set()
    os.environ.update(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with joined(TIMEOUT_SECONDS):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("store_is_there", [True, False])
def test_a_signal_ends_a_process_that_waits(number: signal.Signals, store_is_there: bool) -> None:
    """There is nothing to save."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if store_is_there else None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", join.__name__])
    begun = context.Event()
    process = context.Process(target=wait_alone, args=(store.port if store is not None else free_port(), begun))
    process.start()
    assert process.pid is not None
    assert begun.wait(TIMEOUT_SECONDS)
    time.sleep(0.5)
    os.kill(process.pid, number)
    process.join(TIMEOUT_SECONDS / 2)
    assert process.exitcode == (-signal.SIGTERM if number == signal.SIGTERM else 1), "1: KeyboardInterrupt"
