"""What the launchers set, mapped to what torch reads."""

from __future__ import annotations

import pytest

from megatron_prune.errors import UserError
from megatron_prune.parallel.mesh import map_launcher_environment

SLURM = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}


def test_slurm_is_mapped() -> None:
    environ = {**SLURM, "MASTER_ADDR": "node0"}
    map_launcher_environment(environ)
    assert (environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]) == ("3", "1", "8")
    assert environ["MASTER_ADDR"] == "node0"
    assert environ["MASTER_PORT"]


def test_slurm_without_an_address_says_what_to_export() -> None:
    with pytest.raises(UserError, match="export MASTER_ADDR"):
        map_launcher_environment(dict(SLURM))


def test_torchrun_and_deepspeed_are_left_alone() -> None:
    environ = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1", **SLURM}
    before = dict(environ)
    map_launcher_environment(environ)
    assert environ == before


@pytest.mark.parametrize("environ", [{}, {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}])
def test_a_plain_start_is_a_group_of_one(environ: dict[str, str]) -> None:
    environ = dict(environ)
    map_launcher_environment(environ)
    assert environ["WORLD_SIZE"] == "1"
    assert environ["RANK"] == "0"
    assert int(environ["MASTER_PORT"]) > 0
