"""The few collectives pruning needs, each over an explicit group of a :class:`~megatron_prune.parallel.mesh.Mesh`."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.errors import MegatronPruneError
from megatron_prune.parallel.mesh import Mesh


def all_reduce_sum_(tensor: Tensor, mesh: Mesh) -> None:
    """Sum a tensor over all processes in place."""
    if mesh.world_size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)


def sum_over_stage_(tensor: Tensor, mesh: Mesh) -> None:
    """Sum a tensor over all copies and tensor-parallel ranks of this stage in place."""
    if mesh.stage_group is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=mesh.stage_group)


def sum_over_copies_(tensor: Tensor, mesh: Mesh) -> None:
    """Sum a tensor over the data-parallel copies of this shard in place."""
    if mesh.dp_group is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=mesh.dp_group)


def tensors_beside(tensor: Tensor, mesh: Mesh) -> list[Tensor]:
    """One tensor of every rank that splits this stage's layers, in rank order; all have the same shape.

    Args:
        tensor: this rank's, contiguous.
        mesh: groups.
    """
    if mesh.tp_group is None:
        return [tensor]
    tensors = [torch.empty_like(tensor) for _ in range(mesh.tp_size)]
    dist.all_gather(tensors, tensor, group=mesh.tp_group)
    return tensors


def sum_over_tensor_parallel_(tensor: Tensor, mesh: Mesh) -> None:
    """Sum a tensor over the ranks that split this stage's layers in place."""
    if mesh.tp_group is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=mesh.tp_group)


def sum_to_main_(tensor: Tensor, mesh: Mesh) -> None:
    """Sum a tensor over all processes in place; only the main one may read the result."""
    if mesh.world_size > 1:
        dist.reduce(tensor, dst=0, op=dist.ReduceOp.SUM)


def sum_over_stages_(tensor: Tensor, mesh: Mesh) -> None:
    """Sum a tensor over the pipeline's stages in place."""
    if mesh.pp_group is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=mesh.pp_group)


def largest(value: int, mesh: Mesh) -> int:
    """The largest of one integer per process, on every process."""
    if mesh.world_size == 1:
        return value
    flag = torch.tensor(value)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=mesh.control_group)
    return int(flag)


def from_main(value: Any, mesh: Mesh) -> Any:
    """The main process's picklable value, on every process."""
    if mesh.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=mesh.control_group)
    return box[0]


def gather(value: Any, mesh: Mesh) -> list[Any]:
    """One picklable value per process, in rank order, on every process."""
    values: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(values, value, group=mesh.control_group)
    return values


def agreed(decision: str, mesh: Mesh) -> str:
    """The main process's decision, broadcast and compared with this process's own by hash.

    Raises:
        MegatronPruneError: some process decided otherwise; both decisions are named.
    """
    if mesh.world_size == 1:
        return decision
    chosen: str = from_main(decision, mesh)
    differs = _digest(decision) != _digest(chosen)
    if largest(int(differs), mesh):
        decisions = gather(decision, mesh)
        rank, other = next((rank, theirs) for rank, theirs in enumerate(decisions) if theirs != chosen)
        raise MegatronPruneError(
            f"ranks disagree: rank 0 chose {chosen}, rank {rank} chose {other}; their weights, gradients or run "
            "directories differ (--save must be shared by all nodes), resume from the last checkpoint"
        )
    return chosen


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def barrier(mesh: Mesh) -> None:
    """Wait for every process."""
    if mesh.world_size > 1:
        dist.barrier(group=mesh.control_group)
