"""Process groups, made once and passed on: no module of this package asks for "the current" group."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import MutableMapping
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_prune.errors import ConfigError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)

#: What srun sets -> what torch reads. The rendezvous address is not among them: the sbatch script exports it. The batch
#: script itself has SLURM_PROCID, SLURM_LOCALID and SLURM_NTASKS too, but is no task of a step.
SLURM_VARIABLES = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}


@dataclasses.dataclass(frozen=True)
class Mesh:
    """This process's place and its groups.

    Ranks are laid out as DeepSpeed lays them out: stages outermost, then copies, then the tensor-parallel ranks of a
    copy's stage side by side, where the network is fastest. A group of one process is None.

    Attributes:
        rank: global rank.
        world_size: number of processes.
        tp_rank: position among the processes that split every layer of this stage.
        tp_size: their number.
        tp_group: these processes.
        pp_rank: stage.
        pp_size: number of stages.
        pp_group: one process of every stage, with this copy and tensor-parallel rank.
        dp_rank: position among the data-parallel copies of this shard.
        dp_size: number of copies.
        dp_group: the processes that hold copies of this one's shard.
        stage_group: all processes of this stage, copies and tensor-parallel ranks.
        control_group: all processes, on a backend that moves CPU tensors (flags, decisions, counters).
        device: where this process computes.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    tp_group: dist.ProcessGroup | None
    pp_rank: int
    pp_size: int
    pp_group: dist.ProcessGroup | None
    dp_rank: int
    dp_size: int
    dp_group: dist.ProcessGroup | None
    stage_group: dist.ProcessGroup | None
    control_group: dist.ProcessGroup
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the process that writes and prints."""
        return self.rank == 0


def map_launcher_environment(environ: MutableMapping[str, str]) -> str | None:
    """Set RANK, LOCAL_RANK and WORLD_SIZE from what the launcher gave, and the port if it is Slurm's to choose.

    ``deepspeed`` and ``torchrun`` set them already. Under ``srun`` they come from ``SLURM_*``; a step of several tasks
    needs ``MASTER_ADDR`` from the batch script. A plain ``python`` start becomes a group of one, also where a batch
    script makes it without ``srun``.

    Returns:
        What the user may not have meant, or None.

    Raises:
        ConfigError: a step of several tasks without MASTER_ADDR.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        environ.setdefault("LOCAL_RANK", environ["RANK"])
        return None
    if all(name in environ for name in SLURM_VARIABLES.values()) and int(environ["SLURM_STEP_NUM_TASKS"]) > 1:
        environ.update({name: environ[slurm] for name, slurm in SLURM_VARIABLES.items()})
        if "MASTER_ADDR" not in environ:
            raise ConfigError(
                [
                    "srun started several tasks but MASTER_ADDR is not set; in the batch script: export MASTER_ADDR="
                    "$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1) MASTER_PORT=29500"
                ]
            )
        environ.setdefault("MASTER_PORT", "29500")
        return None
    environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    tasks = environ.get("SLURM_NTASKS", "1")
    return None if tasks == "1" else f"note: this is one process of a Slurm job of {tasks} tasks; srun starts them all"


def init_process_group(store: dist.Store | None = None) -> torch.device:
    """Make the job's process group (NCCL with GPUs, else gloo) and return this process's device.

    Args:
        store: where all processes have met. By default torch's own rendezvous, and none for a job of one process, which
            has nobody to meet: it opens no port, that any number of them may start on one machine.
    """
    map_launcher_environment(os.environ)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # srun --gpus-per-task=1 shows every task one device, number 0, whatever its number on the node.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if store is None and world_size == 1:
            store = dist.HashStore()
        if store is None:
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        else:
            store.set_timeout(COLLECTIVE_TIMEOUT)
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, store=store, rank=rank, world_size=world_size)
    return device


def make_mesh(device: torch.device, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> Mesh:
    """Arrange the job's processes; every one of them calls it, once.

    Args:
        device: of this process.
        tensor_parallel: processes that split every layer.
        pipeline_parallel: stages. What the two do not split are data-parallel copies.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    copies, rest = divmod(world_size, tensor_parallel * pipeline_parallel)
    assert not rest, "validate_config was not called"
    on_cpu = device.type == "cpu"
    control = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    assert control is not None
    ranks = torch.arange(world_size).view(pipeline_parallel, copies, tensor_parallel)
    pp_rank, dp_rank, tp_rank = (int(place) for place in (ranks == rank).nonzero()[0])
    return Mesh(
        rank=rank,
        world_size=world_size,
        tp_rank=tp_rank,
        tp_size=tensor_parallel,
        tp_group=_own_group(ranks.flatten(0, 1), rank),
        pp_rank=pp_rank,
        pp_size=pipeline_parallel,
        pp_group=_own_group(ranks.flatten(1, 2).T, rank),
        dp_rank=dp_rank,
        dp_size=copies,
        dp_group=_own_group(ranks.transpose(1, 2).flatten(0, 1), rank),
        stage_group=_own_group(ranks.flatten(1, 2), rank),
        control_group=control,
        device=device,
    )


def _own_group(rows: torch.Tensor, rank: int) -> dist.ProcessGroup | None:
    """Make a group of every row of ranks, on all processes in the same order, and return the one this rank is in."""
    own = None
    for members in rows.tolist():
        if len(members) == 1:
            continue
        group = dist.new_group(members, timeout=COLLECTIVE_TIMEOUT)
        if rank in members:
            own = group
    return own
