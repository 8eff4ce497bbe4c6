"""Process groups, made once and passed on: no module of this package asks for "the current" group."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import MutableMapping
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_prune.errors import UserError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)

#: What srun sets -> what torch reads. The rendezvous address is not among them: the sbatch script exports it.
SLURM_VARIABLES = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


@dataclasses.dataclass(frozen=True)
class Mesh:
    """This process's place and its groups.

    Attributes:
        rank: global rank.
        world_size: number of processes.
        dp_rank: position among the data-parallel copies of this shard.
        dp_size: number of copies.
        dp_group: the copies.
        control_group: all processes, on a backend that moves CPU tensors (flags, decisions, counters).
        device: where this process computes.
    """

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    dp_group: dist.ProcessGroup
    control_group: dist.ProcessGroup
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the process that writes and prints."""
        return self.rank == 0


def map_launcher_environment(environ: MutableMapping[str, str]) -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from what the launcher gave.

    ``deepspeed`` and ``torchrun`` set them already. Under ``srun`` they come from ``SLURM_*``; a job of several tasks
    needs ``MASTER_ADDR`` from the batch script. A plain ``python`` start becomes a group of one.

    Raises:
        UserError: a Slurm job of several tasks without MASTER_ADDR.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        environ.setdefault("LOCAL_RANK", environ["RANK"])
        return
    if all(name in environ for name in SLURM_VARIABLES.values()) and int(environ["SLURM_NTASKS"]) > 1:
        if "MASTER_ADDR" not in environ:
            raise UserError(
                "srun started several tasks but MASTER_ADDR is not set; in the batch script: "
                "export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1) MASTER_PORT=29500"
            )
        environ.setdefault("MASTER_PORT", "29500")
        environ.update({name: environ[slurm] for name, slurm in SLURM_VARIABLES.items()})
        return
    environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"})
    environ["MASTER_PORT"] = str(_free_port())


def init_process_group() -> torch.device:
    """Join the job's process group (NCCL with GPUs, else gloo) and return this process's device."""
    map_launcher_environment(os.environ)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    return device


def make_mesh(device: torch.device, dp_group: dist.ProcessGroup) -> Mesh:
    """Describe this process; every process of the job calls it once, after the model's groups exist."""
    on_cpu = device.type == "cpu"
    control = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    assert control is not None
    return Mesh(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp_rank=dist.get_rank(dp_group),
        dp_size=dist.get_world_size(dp_group),
        dp_group=dp_group,
        control_group=control,
        device=device,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
