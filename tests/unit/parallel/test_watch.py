"""The watch over peers: real processes that are killed, fail, pause and finish, without the training around them."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch.distributed as dist
from ports import free_port

from megatron_prune.errors import EXIT_BAD_INPUT, EXIT_FAILURE, MegatronPruneError, StopRequested, UserError
from megatron_prune.parallel import relay
from megatron_prune.parallel.phases import Phases
from megatron_prune.parallel.relay import keep_alive
from megatron_prune.parallel.watch import PeerWatch, watch_peers

RANKS = 3
TIMEOUT_SECONDS = 60.0
SHORT_SECONDS = 1.0  # a silence that keepalive probes fill and a stopped process would not


class Job:
    """Three processes under watch, each running ``work(rank, directory)``; their stderr goes to files.

    Args:
        directory: for the meeting place, the stderr of each rank and the marks they leave.
        work: runs inside the watch.
        grace: as in :class:`PeerWatch`.
        stall: as in :class:`PeerWatch`.
    """

    def __init__(
        self, directory: Path, work: Callable[[int, Path], None], grace: float = 10.0, stall: float = 600.0
    ) -> None:
        self.directory = directory
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "megatron_prune.parallel.watch"])
        self.processes: list[BaseProcess] = [
            context.Process(target=run_rank, args=(rank, directory, work, grace, stall)) for rank in range(RANKS)
        ]
        for process in self.processes:
            process.start()

    def wait_until_watched(self) -> None:
        """Until every rank is inside the watch and known to rank 0."""
        wait_for(lambda: all((self.directory / f"inside{rank}").exists() for rank in range(RANKS)))

    def kill(self, rank: int) -> None:
        process_id = self.processes[rank].pid
        assert process_id is not None
        os.kill(process_id, signal.SIGKILL)

    def codes(self) -> list[int | None]:
        """Exit codes of all ranks once they are gone."""
        for process in self.processes:
            process.join(TIMEOUT_SECONDS)
        return [process.exitcode for process in self.processes]

    def errors(self, rank: int) -> str:
        """What a rank wrote to stderr."""
        return (self.directory / f"stderr{rank}").read_text()

    def name(self, rank: int) -> str:
        return f"rank {rank} on {socket.gethostname()} (pid {self.processes[rank].pid})"


def run_rank(rank: int, directory: Path, work: Callable[[int, Path], None], grace: float, stall: float) -> None:
    """A process of the job: as ``main`` does it, with short limits."""
    file = os.open(directory / f"stderr{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    store = dist.FileStore(str(directory / "store"), RANKS)
    phases = Phases()
    peers = PeerWatch(
        rank, RANKS, store, "localhost", phases=phases, silence=SHORT_SECONDS, patience=1.0, grace=grace, stall=stall
    )
    try:
        with peers:
            phases.enter("work" if rank == 1 else "wait for work", 3)
            if rank != 1:
                phases.enter("next step", 4)
            (directory / f"inside{rank}").touch()
            work(rank, directory)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except StopRequested:
        sys.exit(75)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sleep_on(rank: int, directory: Path) -> None:
    time.sleep(10 * TIMEOUT_SECONDS)


def wait_for_the_end(rank: int, directory: Path) -> None:
    wait_for((directory / "end").exists)


def echo_of_a_dead_peer(rank: int, directory: Path) -> None:
    wait_for((directory / "end").exists)
    raise RuntimeError("Connection closed by peer")


def one_bad_input(rank: int, directory: Path) -> None:
    if rank == 2:
        raise UserError("--data-path x does not exist")
    time.sleep(10 * TIMEOUT_SECONDS)


def one_crash(rank: int, directory: Path) -> None:
    if rank == 1:
        raise RuntimeError("out of\nmemory")
    time.sleep(10 * TIMEOUT_SECONDS)


def main_crashes(rank: int, directory: Path) -> None:
    if rank == 0:
        raise ValueError("shape")
    time.sleep(10 * TIMEOUT_SECONDS)


def all_meet_the_same_mistake(rank: int, directory: Path) -> None:
    time.sleep(0.1 * rank)
    raise UserError(f"the last rank says this too: {rank}")


def all_are_asked_to_stop(rank: int, directory: Path) -> None:
    time.sleep(0.1 * (RANKS - rank))
    raise StopRequested("stopped at step 3")


def leave_one_by_one(rank: int, directory: Path) -> None:
    """The last rank first, rank 0 long after the others are gone."""
    time.sleep(0.3 * (RANKS - rank))


class StuckTeardown:
    """An error that cannot be reported: its text waits, as the teardown of a communicator may."""

    def __call__(self, rank: int, directory: Path) -> None:
        if rank == 1:
            raise StuckError
        time.sleep(10 * TIMEOUT_SECONDS)


class StuckError(UserError):
    def __init__(self) -> None:
        super().__init__("bad sample")
        self.told = False

    def __str__(self) -> str:
        if self.told:
            time.sleep(10 * TIMEOUT_SECONDS)
        self.told = True
        return "bad sample"


@pytest.mark.parametrize("victim", range(RANKS))
def test_a_killed_rank_is_named_by_all_others(tmp_path: Path, victim: int) -> None:
    job = Job(tmp_path, sleep_on)
    job.wait_until_watched()
    job.kill(victim)
    assert job.codes() == [-signal.SIGKILL if rank == victim else EXIT_FAILURE for rank in range(RANKS)]
    for rank in set(range(RANKS)) - {victim}:
        line = f"error: {job.name(victim)} died; all ranks stop; start again to resume from the last checkpoint\n"
        assert job.errors(rank) == line


def test_an_echo_of_the_death_does_not_hide_it(tmp_path: Path) -> None:
    """gloo's exception may reach the main thread before the news does."""
    job = Job(tmp_path, echo_of_a_dead_peer)
    job.wait_until_watched()
    (tmp_path / "end").touch()
    job.kill(1)
    assert job.codes() == [EXIT_FAILURE, -signal.SIGKILL, EXIT_FAILURE]
    for rank in (0, 2):
        assert f"{job.name(1)} died" in job.errors(rank)
        assert "Traceback" not in job.errors(rank)


def test_a_stopped_rank_is_not_dead(tmp_path: Path) -> None:
    job = Job(tmp_path, wait_for_the_end)
    job.wait_until_watched()
    process_id = job.processes[1].pid
    assert process_id is not None
    os.kill(process_id, signal.SIGSTOP)
    time.sleep(2.5 * SHORT_SECONDS)
    os.kill(process_id, signal.SIGCONT)
    (tmp_path / "end").touch()
    assert job.codes() == [0, 0, 0]


def test_a_rank_that_is_stuck_is_named_and_not_ended(tmp_path: Path) -> None:
    job = Job(tmp_path, wait_for_the_end, stall=SHORT_SECONDS)
    job.wait_until_watched()
    # Repeated at twice the time: a busy machine may delay a rank's first reports.
    said = re.compile(
        re.escape(f"note: {job.name(1)} has been in `work` of step 3 for ")
        + r"\d+ s \(.*\) while the others wait in `next step` of step 4\n"
    )
    wait_for(lambda: said.search(job.errors(0)))
    (tmp_path / "end").touch()
    assert job.codes() == [0, 0, 0]


@pytest.mark.parametrize("victim", range(RANKS))
def test_a_rank_that_is_stopped_is_named(tmp_path: Path, victim: int) -> None:
    job = Job(tmp_path, wait_for_the_end, stall=SHORT_SECONDS)
    process_id = job.processes[victim].pid
    assert process_id is not None
    job.wait_until_watched()
    os.kill(process_id, signal.SIGSTOP)
    speaker = 0 if victim else 1
    wait_for(lambda: f"note: {job.name(victim)} has said nothing for " in job.errors(speaker))
    os.kill(process_id, signal.SIGCONT)
    (tmp_path / "end").touch()
    assert job.codes() == [0, 0, 0]


def test_bad_input_on_one_rank_ends_all_with_its_code(tmp_path: Path) -> None:
    job = Job(tmp_path, one_bad_input)
    assert job.codes() == [EXIT_BAD_INPUT] * RANKS
    assert job.errors(2) == "error: --data-path x does not exist\n"
    for rank in (0, 1):
        assert job.errors(rank) == f"error: {job.name(2)} failed: --data-path x does not exist; all ranks stop\n"


@pytest.mark.parametrize(
    ("work", "culprit", "summary"),
    [(one_crash, 1, "RuntimeError: out of memory"), (main_crashes, 0, "ValueError: shape")],
    ids=["rank1", "rank0"],
)
def test_a_crash_keeps_its_traceback(
    tmp_path: Path, work: Callable[[int, Path], None], culprit: int, summary: str
) -> None:
    job = Job(tmp_path, work)
    assert job.codes() == [EXIT_FAILURE] * RANKS
    for rank in range(RANKS):
        assert ("Traceback" in job.errors(rank)) == (rank == culprit)
        assert (f"error: {job.name(culprit)} failed: {summary}; all" in job.errors(rank)) == (rank != culprit)


def test_the_same_mistake_on_all_ranks_is_each_rank_s_own(tmp_path: Path) -> None:
    job = Job(tmp_path, all_meet_the_same_mistake)
    assert job.codes() == [EXIT_BAD_INPUT] * RANKS
    assert [job.errors(rank) for rank in range(RANKS)] == [
        f"error: the last rank says this too: {rank}\n" for rank in range(RANKS)
    ]


def test_a_failed_rank_that_hangs_is_ended(tmp_path: Path) -> None:
    job = Job(tmp_path, StuckTeardown(), grace=0.5)
    assert job.codes() == [EXIT_BAD_INPUT] * RANKS
    assert "failed: bad sample" in job.errors(0)


@pytest.mark.parametrize(("work", "code"), [(leave_one_by_one, 0), (all_are_asked_to_stop, 75)])
def test_leaving_is_not_dying(tmp_path: Path, work: Callable[[int, Path], None], code: int) -> None:
    job = Job(tmp_path, work)
    assert job.codes() == [code] * RANKS
    assert [job.errors(rank) for rank in range(RANKS)] == ["", "", ""]


@contextmanager
def pair(ended: list[int]) -> Iterator[int]:
    """Two ranks' watches in this process; gives the port of the relay, and the exit codes that they ask for."""
    store = dist.HashStore()
    watches = [PeerWatch(rank, 2, store, "localhost", where="here", end=ended.append) for rank in range(2)]
    entering = [threading.Thread(target=each.__enter__) for each in watches]
    for thread in entering:
        thread.start()
    for thread in entering:
        thread.join()
    yield json.loads(store.get("rank 0"))["port"]
    for each in watches:
        each.__exit__(None, None, None)


def test_nothing_is_left_behind() -> None:
    ended: list[int] = []
    with pair(ended):
        assert any(thread.name == "peer-watch-relay" for thread in threading.enumerate())
    threads, files = set(threading.enumerate()), sorted(os.listdir("/proc/self/fd"))
    with pair(ended):
        assert len(os.listdir("/proc/self/fd")) > len(files)
    assert set(threading.enumerate()) == threads
    assert sorted(os.listdir("/proc/self/fd")) == files
    assert not ended


@pytest.mark.parametrize("words", ["GET / HTTP/1.1", '{"hello": "guess", "rank": 1, "where": "x"}'])
def test_strangers_are_ignored(words: str) -> None:
    ended: list[int] = []
    with pair(ended) as port:
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(f'{words}\n{{"failed": "x", "code": 9}}\n'.encode())
        time.sleep(0.2)
    assert not ended


@contextmanager
def relayed() -> Iterator[tuple[int, threading.Thread]]:
    """A relay without processes around it: its port and its thread. The token is ``t``."""
    listener, (mine, its) = relay.listen_anywhere(), socket.socketpair()
    thread = threading.Thread(target=relay.Relay(listener, its, "here", "t", 40.0, 600.0).run)
    thread.start()
    yield listener.getsockname()[1], thread
    mine.close()
    thread.join(TIMEOUT_SECONDS)


@pytest.mark.parametrize(
    "words",
    [b"[" * 3000 + b"\n", b"\n", b"1\n", b'{"hello": "t", "rank": [], "where": "x"}\n', b"x" * (1 << 20)],
    ids=["deep", "empty", "number", "hello", "endless"],
)
def test_what_a_stranger_says_first_is_the_last(words: bytes) -> None:
    with relayed() as (port, thread):
        with socket.create_connection(("localhost", port), timeout=TIMEOUT_SECONDS) as stranger, suppress(OSError):
            stranger.sendall(words)
            assert stranger.recv(1) == b"", "the line is closed"
        assert thread.is_alive()


@pytest.mark.parametrize(
    "words", [b"[" * 3000, b"x", b'{"report": {"bad": 1}}', b'{"report": {"seconds": "x"}}', b'{"failed": 1}', b"{}"]
)
def test_a_malformed_message_of_a_member_changes_nothing(words: bytes) -> None:
    report = b'{"report": {"sequence": 1, "phase": "x", "seconds": 0.0, "place": "", "waiting": false}}\n'
    with relayed() as (port, thread), socket.create_connection(("localhost", port), TIMEOUT_SECONDS) as member:
        member.sendall(b'{"hello": "t", "rank": 1, "where": "x"}\n' + words + b"\n" + report)
        assert member.recv(99) == b'{"heard": true}\n'
        assert thread.is_alive()


def test_a_rank_that_never_joins_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "JOIN_SECONDS", 0.1)
    with pytest.raises(MegatronPruneError, match=r"not heard of .* rank\(s\) 1, 2$"):
        PeerWatch(0, 3, dist.HashStore(), "localhost").__enter__()


def test_an_address_that_is_not_rank_0_s_is_one_line() -> None:
    store = dist.HashStore()
    closed = free_port()
    store.set("rank 0", f'{{"port": {closed}, "token": "", "where": "x"}}')
    with pytest.raises(UserError, match=rf"rank 3 cannot reach rank 0 at 127\.0\.0\.1:{closed}.*MASTER_ADDR"):
        PeerWatch(3, 4, store, "127.0.0.1").__enter__()


def test_a_job_of_one_is_not_watched() -> None:
    assert isinstance(watch_peers(None, Phases()), nullcontext)


def test_the_kernel_gives_up_a_vanished_host_in_time() -> None:
    with socket.socket() as connection:
        keep_alive(connection, 40)
        first, interval, probes = (
            connection.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert first + interval * probes == 40
