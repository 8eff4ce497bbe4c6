"""Move tensors between the logical (live) model and the physical fragments that ranks hold of it.

One pair of functions serves import, export, compaction and resume: :func:`deposit_` puts a rank's fragment into the
logical tensor, :func:`take` cuts a rank's fragment out of it, dead padding zero. A *fragment* is a contiguous run of
the flattened physical tensor of one tensor-parallel rank; a whole tensor is the fragment that starts at 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from megatron_prune.architecture import TensorSpec
from megatron_prune.parallel.partition import DEAD, IntArray, Partition, is_split


@dataclasses.dataclass(frozen=True)
class Block:
    """A rectangle of a matrix that is contiguous in a flat fragment of it.

    Attributes:
        rows: of the matrix.
        columns: of the matrix; all of them unless the block is one row.
        flat: where the fragment holds it.
    """

    rows: slice
    columns: slice
    flat: slice

    def view(self, fragment: Tensor) -> Tensor:
        """The block's part of a fragment, ``[rows, columns]``."""
        return fragment[self.flat].view(self.rows.stop - self.rows.start, self.columns.stop - self.columns.start)


def blocks(start: int, numel: int, width: int) -> Iterator[Block]:
    """Cut a flat fragment of a matrix into at most three rectangles: a row's tail, whole rows, a row's head.

    Args:
        start: position of the fragment's first element in the flattened matrix.
        numel: its length.
        width: columns of the matrix; 1 for a vector.
    """
    position = 0
    while position < numel:
        row, column = divmod(start + position, width)
        whole_rows = (numel - position) // width
        if column or not whole_rows:
            length = min(width - column, numel - position)
            yield Block(slice(row, row + 1), slice(column, column + length), slice(position, position + length))
        else:
            length = whole_rows * width
            yield Block(slice(row, row + whole_rows), slice(0, width), slice(position, position + length))
        position += length


def take(logical: Tensor, spec: TensorSpec, partition: Partition, tp_rank: int, start: int, numel: int) -> Tensor:
    """A rank's fragment of a logical tensor.

    Args:
        logical: the live tensor, units in ascending source order.
        spec: which tensor it is.
        partition: where its units go.
        tp_rank: whose physical tensor.
        start: first element of the fragment in the flattened physical tensor.
        numel: length of the fragment.

    Returns:
        ``[numel]`` of the same dtype, zero where a slot is dead. A copied KV head is there for every rank that has it.
    """
    rows, columns = positions(spec, partition, tp_rank, kept=False)
    matrix = logical if logical.dim() == 2 else logical[:, None]
    fragment = torch.zeros(numel, dtype=logical.dtype, device=logical.device)
    for block in blocks(start, numel, len(columns)):
        row, column = rows[block.rows], columns[block.columns]
        alive = _select(_select(matrix, 0, row[row != DEAD]), 1, column[column != DEAD])
        _put(block.view(fragment), row != DEAD, column != DEAD, alive)
    return fragment


def deposit_(
    logical: Tensor, fragment: Tensor, spec: TensorSpec, partition: Partition, tp_rank: int, start: int
) -> None:
    """Write into a logical tensor what a rank's fragment keeps of it, in place.

    Every live element has one keeper: of a copied KV head, and of a tensor that is whole on every rank, the lowest
    rank. So the fragments of all ranks, deposited into zeros and added up, give the tensor.

    Args:
        logical: ``partition.logical_shape(spec)``.
        fragment: ``[numel]``.
        spec: which tensor it is.
        partition: where its units are.
        tp_rank: whose fragment.
        start: position of its first element in the flattened physical tensor.
    """
    rows, columns = positions(spec, partition, tp_rank, kept=True)
    matrix = logical if logical.dim() == 2 else logical[:, None]
    for block in blocks(start, fragment.numel(), len(columns)):
        row, column = rows[block.rows], columns[block.columns]
        alive = _select(_select(block.view(fragment), 0, np.nonzero(row != DEAD)[0]), 1, np.nonzero(column != DEAD)[0])
        where = np.ix_(row[row != DEAD], column[column != DEAD])
        matrix[tuple(torch.from_numpy(index).to(matrix.device) for index in where)] = alive


def place(logical: Tensor, spec: TensorSpec, partition: Partition, tp_rank: int = 0) -> Tensor:
    """Logical tensor -> a rank's whole physical tensor, dead padding zero."""
    shape = partition.shape(spec, tp_rank)
    return take(logical, spec, partition, tp_rank, 0, int(np.prod(shape))).view(shape)


def kept_mask(spec: TensorSpec, partition: Partition, tp_rank: int, start: int, numel: int) -> Tensor:
    """Which elements of a flat fragment this rank is the keeper of: bool ``[numel]``. See :func:`deposit_`."""
    rows, columns = positions(spec, partition, tp_rank, kept=True)
    mask = torch.zeros(numel, dtype=torch.bool)
    for block in blocks(start, numel, len(columns)):
        kept = (rows[block.rows, None] != DEAD) & (columns[None, block.columns] != DEAD)
        mask[block.flat] = torch.from_numpy(kept.reshape(-1))
    return mask


def positions(spec: TensorSpec, partition: Partition, tp_rank: int, kept: bool) -> tuple[IntArray, IntArray]:
    """Of every physical row and column its position in the logical tensor, or DEAD; one column for a vector.

    Args:
        spec: which tensor it is.
        partition: where its units are.
        tp_rank: whose physical tensor.
        kept: DEAD also where a lower rank is the keeper.
    """
    found = []
    for axis in spec.axes:
        elements = (partition.kept_elements if kept else partition.elements)(axis, spec.layer, tp_rank)
        if kept and tp_rank and not is_split(spec):
            elements = np.full_like(elements, DEAD)
        alive = partition.live_elements(axis, spec.layer)
        found.append(np.where(elements == DEAD, DEAD, np.searchsorted(alive, elements)))
    return found[0], found[1] if len(found) == 2 else np.zeros(1, dtype=np.int64)


def _select(matrix: Tensor, dim: int, index: IntArray) -> Tensor:
    if len(index) == matrix.shape[dim] and np.array_equal(index, np.arange(len(index))):
        return matrix  # nothing to leave out: no copy
    return matrix.index_select(dim, torch.from_numpy(np.ascontiguousarray(index)).to(matrix.device))


def _put(target: Tensor, rows: np.ndarray, columns: np.ndarray, values: Tensor) -> None:
    if rows.all() and columns.all():
        target.copy_(values)
        return
    where = np.ix_(np.nonzero(rows)[0], np.nonzero(columns)[0])
    target[tuple(torch.from_numpy(index).to(target.device) for index in where)] = values
