"""A killed rank ends the whole job at once, under every launcher of one host, and is named."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
from hosts import START_SECONDS, TinyRun, ended, rank_processes, read_lines, start, wait_for

END_SECONDS = 60  # what is promised


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("dead"), repo_root)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_killed_rank_ends_the_job(tiny: TinyRun, launcher: str) -> None:
    save = tiny.root / launcher
    job = start(tiny.on_one_host(launcher, tiny.flags(launcher, [], iters=1_000_000)), {})
    with ended([job]):
        wait_for(lambda: read_lines(save / "metrics.jsonl"), [job], START_SECONDS)
        victim = rank_processes(save)[1]
        os.kill(victim, signal.SIGKILL)
        output, _ = job.communicate(timeout=END_SECONDS)
        assert job.returncode not in (0, 75), output
        name = f"rank 1 on {socket.gethostname()} (pid {victim})"
        assert f"error: {name} died; all ranks stop; start again to resume from the last checkpoint" in output
        assert not rank_processes(save)
