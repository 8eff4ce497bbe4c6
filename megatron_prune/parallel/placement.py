"""Move tensors between the logical (live) model and a Partition, or between two Partitions.

One routine serves import, export, compaction and resume: take the elements that stay, put them where the new table
says, and fill dead padding with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_prune.architecture import TensorSpec
from megatron_prune.parallel.partition import DEAD, IntArray, Partition, live_positions, moved


def place(logical: Tensor, spec: TensorSpec, partition: Partition, tp_rank: int = 0) -> Tensor:
    """Live (logical) tensor -> physical tensor of one rank, dead padding zero.

    Args:
        logical: the live tensor, units in ascending source order.
        spec: which tensor it is.
        partition: where its units go.
        tp_rank: whose shard to build.

    Returns:
        A new tensor of ``partition.shape(spec, tp_rank)``, same dtype.
    """
    columns = [live_positions(partition.elements(axis, spec.layer, tp_rank)) for axis in spec.axes]
    return _take(logical, columns)


def extract(physical: Tensor, spec: TensorSpec, partition: Partition, tp_rank: int = 0) -> Tensor:
    """Physical tensor -> live (logical) tensor, units in ascending source order. Inverse of :func:`place`."""
    for dim, axis in enumerate(spec.axes):
        elements = partition.elements(axis, spec.layer, tp_rank)
        alive = np.nonzero(elements != DEAD)[0]
        order = alive[np.argsort(elements[alive], kind="stable")]
        physical = _select(physical, dim, order)
    return physical


def move(physical: Tensor, spec: TensorSpec, old: Partition, new: Partition, tp_rank: int = 0) -> Tensor:
    """Physical tensor under ``old`` -> physical tensor under ``new`` (a subset of the same units)."""
    columns = [
        moved(old.elements(axis, spec.layer, tp_rank), new.elements(axis, spec.layer, tp_rank)) for axis in spec.axes
    ]
    return _take(physical, columns)


def live_mask(spec: TensorSpec, partition: Partition, start: int, numel: int, tp_rank: int = 0) -> Tensor:
    """Which elements of a flat fragment belong to live units.

    Args:
        start: first element of the fragment in the flattened physical tensor.
        numel: length of the fragment.

    Returns:
        Bool tensor ``[numel]``.
    """
    alive = [torch.from_numpy(partition.elements(axis, spec.layer, tp_rank) != DEAD) for axis in spec.axes]
    if len(alive) == 1:
        return alive[0][start : start + numel]
    rows, columns = alive
    first, last = start // len(columns), -(-(start + numel) // len(columns))
    block = (rows[first:last, None] & columns[None]).reshape(-1)
    offset = start - first * len(columns)
    return block[offset : offset + numel]


def _take(tensor: Tensor, columns: Sequence[IntArray]) -> Tensor:
    for dim, index in enumerate(columns):
        if len(index) == tensor.shape[dim] and np.array_equal(index, np.arange(len(index))):
            continue  # untouched dimension: no copy
        tensor = _select(tensor, dim, np.where(index == DEAD, 0, index))
        if (index == DEAD).any():
            tensor.index_fill_(dim, torch.from_numpy(np.nonzero(index == DEAD)[0]).to(tensor.device), 0)
    return tensor.contiguous()


def _select(tensor: Tensor, dim: int, index: IntArray) -> Tensor:
    return tensor.index_select(dim, torch.from_numpy(np.ascontiguousarray(index)).to(tensor.device))
