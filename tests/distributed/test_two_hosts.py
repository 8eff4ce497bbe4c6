"""Two hosts do what one does, through every launcher, and a death on one of them ends the job on both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hosts import (
    LAUNCHERS,
    START_SECONDS,
    Hosts,
    TinyRun,
    ended,
    rank_processes,
    read_lines,
    start,
    two_hosts,
    wait_for,
)
from layout_runs import Cluster

END_SECONDS = 60
STEPS = 24
TENSOR_PARALLEL = ("--tensor-model-parallel-size", "2")
PIPELINE = ("--pipeline-model-parallel-size", "2")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("hosts"), repo_root)


def finish(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Wait until all have finished, successfully; fails with how each of them ended."""
    with ended(processes):
        outputs = [process.communicate(timeout=START_SECONDS)[0] for process in processes]
    ends = [(process.returncode, output.splitlines()[-20:]) for process, output in zip(processes, outputs, strict=True)]
    assert [code for code, _ in ends] == [0, 0], "\n".join(line for _, lines in ends for line in lines)


@pytest.fixture(scope="module")
def one_host(tiny: TinyRun, cluster: Cluster) -> Path:
    """The run on two processes of one host."""
    cluster.run(tiny.script, tiny.flags("one-host", TENSOR_PARALLEL, STEPS), 2, tiny.root)
    return tiny.root / "one-host"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_hosts_equal_one(
    tiny: TinyRun, hosts: Hosts, one_host: Path, launcher: str, record_property: Callable[[str, object], None]
) -> None:
    record_property("hosts", hosts.kind)
    finish(tiny.start_on_two(launcher, hosts, tiny.flags(launcher, TENSOR_PARALLEL, STEPS)))
    mine, theirs = (
        [read_lines(path / name) for name in ("ledger.jsonl", "metrics.jsonl")]
        for path in (tiny.root / launcher, one_host)
    )
    assert {event["type"] for event in mine[0]} == {"attention", "ffn", "stem"}
    assert [(event["step"], event["type"], event["removed"]) for event in mine[0]] == [
        (event["step"], event["type"], event["removed"]) for event in theirs[0]
    ]
    assert [line["step"] for line in mine[1]] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in mine[1]] == pytest.approx([line["loss"] for line in theirs[1]], rel=1e-6)


def test_a_death_on_one_host_ends_both(
    tiny: TinyRun, hosts: Hosts, record_property: Callable[[str, object], None]
) -> None:
    """Nothing but the processes themselves ends the other host: a stand-in for srun has no srun to do it."""
    record_property("hosts", hosts.kind)
    save = tiny.root / "killed"
    job = tiny.start_on_two("srun", hosts, tiny.flags("killed", PIPELINE, iters=1_000_000))
    with ended(job):
        wait_for(lambda: read_lines(save / "metrics.jsonl"), job, START_SECONDS)
        os.kill(rank_processes(save)[1], signal.SIGKILL)
        output, _ = job[0].communicate(timeout=END_SECONDS)
        assert job[0].returncode == 1, output
        assert f"error: rank 1 on {hosts.pair[1].name} (pid " in output
        assert "Traceback" not in output
        assert not rank_processes(save)


def test_a_host_that_vanishes_is_named(
    hosts: Hosts, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Its power fails: no connection is closed. Where a host cannot be unplugged, its process is killed instead."""
    record_property("hosts", hosts.kind)
    worker, address = str(Path(__file__).with_name("watch_worker.py")), hosts.pair[0].address
    job = [
        start([*host.prefix, sys.executable, worker, str(rank), address, str(tmp_path), "4"], {})
        for rank, host in enumerate(hosts.pair)
    ]
    with ended(job):
        wait_for(lambda: all((tmp_path / f"watching{rank}").exists() for rank in range(2)), job, START_SECONDS)
        if hosts.unplug is None:
            job[1].kill()
        else:
            subprocess.run(hosts.unplug, check=True)
        output, _ = job[0].communicate(timeout=END_SECONDS)
        assert output.startswith(f"error: rank 1 on {hosts.pair[1].name} (pid ")
        assert job[0].returncode == 1
        if hosts.unplug is not None:
            output, _ = job[1].communicate(timeout=END_SECONDS)
            assert output.startswith(f"error: rank 0 on {hosts.pair[0].name} (pid "), "and it sees the other one vanish"
            assert job[1].returncode == 1
