"""What the launchers set, mapped to what torch reads."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist

from megatron_prune.errors import ConfigError
from megatron_prune.parallel.mesh import init_process_group, map_launcher_environment

#: A task of a step that srun started, and a batch script, which looks like its first task.
SLURM = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}


def test_slurm_is_mapped() -> None:
    environ = {**SLURM, "MASTER_ADDR": "node0"}
    map_launcher_environment(environ)
    assert (environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]) == ("3", "1", "8")
    assert environ["MASTER_ADDR"] == "node0"
    assert environ["MASTER_PORT"]


def test_slurm_without_an_address_says_what_to_export() -> None:
    environ = dict(SLURM)
    with pytest.raises(ConfigError, match="export MASTER_ADDR"):
        map_launcher_environment(environ)
    assert environ["LOCAL_RANK"] == "1", "so that one task of a node says it"


def test_torchrun_and_deepspeed_are_left_alone() -> None:
    environ = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1", **SLURM}
    before = dict(environ)
    map_launcher_environment(environ)
    assert environ == before


@pytest.mark.parametrize("environ", [{}, {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, BATCH_SCRIPT])
def test_a_plain_start_is_a_group_of_one(environ: dict[str, str]) -> None:
    environ = dict(environ)
    note = map_launcher_environment(environ)
    assert environ["WORLD_SIZE"] == "1"
    assert environ["RANK"] == "0"
    assert (note is not None) == (environ.get("SLURM_NTASKS") == "8")


def test_a_batch_script_without_srun_is_told_so() -> None:
    note = map_launcher_environment(dict(BATCH_SCRIPT))
    assert note is not None
    assert "one process of a Slurm job of 8 tasks" in note


@pytest.mark.parametrize(("devices", "expected"), [(1, 0), (4, 3), (2, 1)])
def test_the_device_of_a_rank(monkeypatch: pytest.MonkeyPatch, devices: int, expected: int) -> None:
    """All devices of the node are visible, or the task's own only."""
    chosen: list[torch.device] = []
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert init_process_group() == torch.device("cuda", expected)
    assert chosen == [torch.device("cuda", expected)]


def test_a_job_of_one_opens_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port that a launcher chose may be another job's by now; a process that meets nobody does not care."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
        for name, value in (place | {"MASTER_PORT": taken.getsockname()[1]}).items():
            monkeypatch.setenv(name, str(value))
        init_process_group()
        try:
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total.item() == 1
        finally:
            dist.destroy_process_group()
