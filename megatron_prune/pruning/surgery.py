"""Zero what a removal takes, in any flat fragment of any tensor.

A removed unit is zeroed everywhere at once (weights, fp32 masters, both Adam moments). Its gradient is then zero and
AdamW keeps it zero, so the masked model trains exactly as the sliced one would.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_prune.architecture import TensorSpec, tensor_specs
from megatron_prune.parallel.partition import IntArray, Partition
from megatron_prune.pruning.groups import newly_dead


def dead_elements(before: Partition, after: Partition, tp_rank: int = 0) -> Iterator[tuple[TensorSpec, int, IntArray]]:
    """Every ``(tensor, dimension, physical elements)`` that a change of liveness zeroes."""
    for spec in tensor_specs(before.source):
        for dim, axis in enumerate(spec.axes):
            gone = newly_dead(before, after, axis, spec.layer, tp_rank)
            if gone.size:
                yield spec, dim, gone


def zero_fragment_(flat: Tensor, start: int, shape: tuple[int, ...], dim: int, index: IntArray) -> None:
    """Zero rows or columns of a matrix (or elements of a vector) inside a flat fragment of it, in place.

    Args:
        flat: ``[numel]`` the fragment.
        start: position of its first element in the flattened tensor.
        shape: physical shape of the whole tensor, one or two dimensions.
        dim: 0 for rows or vector elements, 1 for columns.
        index: which rows, columns or elements.
    """
    width = shape[-1] if len(shape) == 2 else 1
    stop = start + flat.numel()
    if dim == 1:
        for column in index.tolist():
            flat[(column - start) % width :: width] = 0
        return
    for row in index.tolist():
        first, last = max(row * width, start), min((row + 1) * width, stop)
        if first < last:
            flat[first - start : last - start] = 0


def zero_tensor_(tensor: Tensor, dim: int, index: IntArray) -> None:
    """Zero slices of a whole physical tensor in place."""
    with torch.no_grad():
        tensor.index_fill_(dim, torch.from_numpy(index.copy()).to(tensor.device), 0)
