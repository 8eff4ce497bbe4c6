"""What several tensor-parallel ranks hold alike, and how it stays alike.

Two kinds. A *whole* tensor is on every rank (norm gains, biases of row-parallel layers); where each rank sees only a
part of the sequence or of the heads, its gradient is a part of the sum. A *copied* KV head is on every rank that has
one of its queries; its keeper trains it and the others take the keeper's weights after every step. Sums and weights
travel once per optimizer step, all tensors in one collective.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_prune.architecture import TensorSpec
from megatron_prune.parallel.collectives import sum_over_tensor_parallel_
from megatron_prune.parallel.mesh import Mesh
from megatron_prune.parallel.partition import DEAD, Partition, is_split


@dataclasses.dataclass(frozen=True)
class SharedRows:
    """Rows of one parameter that other ranks hold too.

    Attributes:
        count: such rows, all ranks together; the length of the parameter's part of an exchange.
        rows: which rows of the physical parameter they are here, ``[n]`` int64.
        places: where in the exchange they go, ``[n]`` int64.
        kept: which of them this rank trains, ``[n]`` bool. Every rank trains its own copy of a whole tensor:
            DeepSpeed's gradient norm counts those once by itself.
    """

    count: int
    rows: Tensor
    places: Tensor
    kept: Tensor


def shared_rows(spec: TensorSpec, partition: Partition, mesh: Mesh, sequence_parallel: bool) -> SharedRows | None:
    """What of a parameter has to be summed over the tensor-parallel ranks, or None."""
    if mesh.tp_size == 1:
        return None
    if not is_split(spec):
        # q/k norms see this rank's heads only; everything else along the stem sees whole tokens, of which sequence
        # parallelism leaves each rank a part.
        partial = sequence_parallel or "head_dim" in spec.axes
        return _whole(partition.shape(spec)[0], mesh) if partial else None
    return _copied(spec, partition, mesh) if spec.axes[0] == "kv_heads" else None


def sum_gradients_(shared: Sequence[tuple[SharedRows, Tensor]], mesh: Mesh) -> None:
    """Add up the gradients of shared rows in place; a rank that does not train a row gets zero for it.

    Zero, so that the gradient norm counts a copied head once.

    Args:
        shared: rows and the gradient they belong to, the same tensors in the same order on every rank.
        mesh: groups.
    """
    addends = [_exchange(rows, grad, torch.ones_like(rows.kept)) for rows, grad in shared]
    for (rows, grad), total in zip(shared, _summed(addends, mesh), strict=True):
        grad[rows.rows] = (total[rows.places] * _per_row(rows.kept, total)).to(grad.dtype)


def follow_keepers_(shared: Sequence[tuple[SharedRows, Tensor]], mesh: Mesh) -> None:
    """Take the keepers' weights for copied rows, in place. Arguments as in :func:`sum_gradients_`."""
    addends = [_exchange(rows, weight, rows.kept) for rows, weight in shared]
    for (rows, weight), total in zip(shared, _summed(addends, mesh), strict=True):
        weight[rows.rows] = total[rows.places]


def _whole(length: int, mesh: Mesh) -> SharedRows:
    every = torch.arange(length, device=mesh.device)
    return SharedRows(length, every, every, torch.ones(length, dtype=torch.bool, device=mesh.device))


def _copied(spec: TensorSpec, partition: Partition, mesh: Mesh) -> SharedRows | None:
    holders = [partition.elements("kv_heads", spec.layer, rank) for rank in range(mesh.tp_size)]
    held, times = np.unique(np.concatenate([elements[elements != DEAD] for elements in holders]), return_counts=True)
    copied = held[times > 1]
    if not copied.size:
        return None
    here = holders[mesh.tp_rank]
    rows = np.nonzero(np.isin(here, copied))[0]
    kept = partition.kept_elements("kv_heads", spec.layer, mesh.tp_rank)[rows] != DEAD
    indices = (rows, np.searchsorted(copied, here[rows]), kept)
    return SharedRows(len(copied), *(torch.from_numpy(index).to(mesh.device) for index in indices))


def _exchange(rows: SharedRows, tensor: Tensor, mask: Tensor) -> Tensor:
    values = tensor.new_zeros(rows.count, *tensor.shape[1:])
    values[rows.places] = tensor[rows.rows] * _per_row(mask, tensor)
    return values


def _per_row(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *(1 for _ in like.shape[1:])).to(like.dtype)


def _summed(addends: Sequence[Tensor], mesh: Mesh) -> list[Tensor]:
    packed = torch.cat([values.flatten() for values in addends])
    sum_over_tensor_parallel_(packed, mesh)
    pieces = packed.split([values.numel() for values in addends])
    return [piece.view_as(values) for piece, values in zip(pieces, addends, strict=True)]
