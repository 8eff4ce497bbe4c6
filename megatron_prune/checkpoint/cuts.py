"""Between what shards store and what ranks hold: the kept elements of a fragment, and a fragment from stored pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from megatron_prune.architecture import TensorSpec
from megatron_prune.checkpoint.shards import Piece
from megatron_prune.parallel.partition import DEAD, IntArray, Partition, live
from megatron_prune.parallel.placement import blocks, positions


@dataclasses.dataclass(frozen=True)
class Window:
    """A rectangle of a logical tensor; a vector is a matrix of one column.

    Attributes:
        rows: logical rows it spans.
        columns: logical columns it spans.
        values: fp32 ``[rows, columns]``.
    """

    rows: range
    columns: range
    values: Tensor


def kept_count(spec: TensorSpec, partition: Partition, tp_rank: int, start: int, numel: int) -> int:
    """How many elements of a fragment its rank is the keeper of: the sum of its ``kept_mask``, without making one."""
    rows, columns = positions(spec, partition, tp_rank, kept=True)
    return sum(
        int(np.count_nonzero(rows[block.rows] != DEAD)) * int(np.count_nonzero(columns[block.columns] != DEAD))
        for block in blocks(start, numel, len(columns))
    )


def kept_values(fragment: Tensor, spec: TensorSpec, partition: Partition, tp_rank: int, start: int) -> Tensor:
    """The elements of a fragment that its rank is the keeper of, ``[kept]``; a view where nothing is left out."""
    rows, columns = positions(spec, partition, tp_rank, kept=True)
    found = []
    for block in blocks(start, fragment.numel(), len(columns)):
        values = _chosen(block.view(fragment), 0, rows[block.rows] != DEAD)
        found.append(_chosen(values, 1, columns[block.columns] != DEAD).reshape(-1))
    return found[0] if len(found) == 1 else torch.cat([*found, fragment[:0]])


def window_of(spec: TensorSpec, partition: Partition, tp_rank: int, start: int, numel: int) -> tuple[range, range]:
    """The smallest rectangle of the logical tensor, in rows and columns, that has all a fragment needs."""
    rows, columns = positions(spec, partition, tp_rank, kept=False)
    cut = list(blocks(start, numel, len(columns)))
    return (
        _span(np.concatenate([rows[:0], *(rows[block.rows] for block in cut)])),
        _span(np.concatenate([columns[:0], *(columns[block.columns] for block in cut)])),
    )


def read_window(
    spec: TensorSpec, partition: Partition, pieces: Iterable[Piece], rows: range, columns: range
) -> tuple[Window, int]:
    """Read a rectangle of a logical tensor, and only the stored rows that reach into it.

    Args:
        spec: the tensor.
        partition: the placement under which the pieces were stored.
        pieces: all that is stored of the tensor's state.
        rows: of the logical tensor.
        columns: of the logical tensor.

    Returns:
        The window, and how many of its elements the pieces had.
    """
    window = Window(rows, columns, torch.zeros((len(rows), len(columns)), dtype=torch.float32))
    found = sum(_copy_piece_(window, spec, partition, piece) for piece in pieces) if window.values.numel() else 0
    return window, found


def take_from(window: Window, spec: TensorSpec, partition: Partition, tp_rank: int, start: int, numel: int) -> Tensor:
    """A rank's fragment out of a window that has all of it: like ``take`` out of the whole tensor."""
    rows, columns = positions(spec, partition, tp_rank, kept=False)
    fragment = torch.zeros(numel, dtype=torch.float32)
    for block in blocks(start, numel, len(columns)):
        row, column = rows[block.rows], columns[block.columns]
        values = _picked(window.values, 0, row[row != DEAD] - window.rows.start)
        values = _picked(values, 1, column[column != DEAD] - window.columns.start)
        target = block.view(fragment)
        if values.shape == target.shape:
            target.copy_(values)
        else:
            target[_grid(np.nonzero(row != DEAD)[0], np.nonzero(column != DEAD)[0])] = values
    return fragment


def _copy_piece_(window: Window, spec: TensorSpec, partition: Partition, piece: Piece) -> int:
    rows, columns = positions(spec, partition, piece.tp_rank, kept=True)
    stored = found = 0
    for block in blocks(piece.start, piece.numel, len(columns)):
        row, column = _alive(rows[block.rows]), _alive(columns[block.columns])
        inside = np.nonzero((row >= window.rows.start) & (row < window.rows.stop))[0]
        across = np.nonzero((column >= window.columns.start) & (column < window.columns.stop))[0]
        if len(inside) and len(across):
            # Rows ascend, so those inside follow one another in the file.
            first, count = int(inside[0]), len(inside)
            values = piece.read(stored + first * len(column), count * len(column)).view(count, len(column))
            where = _grid(row[inside] - window.rows.start, column[across] - window.columns.start)
            window.values[where] = _picked(values, 1, across)
            found += count * len(across)
        stored += len(row) * len(column)
    assert stored == piece.kept, "the index checked it"
    return found


def _alive(array: IntArray) -> IntArray:
    """What an array of slots or positions holds, in its order, without the dead ones."""
    return array[array != DEAD]


def _span(found: IntArray) -> range:
    alive = live(found)
    return range(int(alive[0]), int(alive[-1]) + 1) if len(alive) else range(0)


def _chosen(matrix: Tensor, dim: int, mask: np.ndarray) -> Tensor:
    return matrix if mask.all() else _picked(matrix, dim, np.nonzero(mask)[0])


def _picked(matrix: Tensor, dim: int, index: IntArray) -> Tensor:
    if len(index) and index[-1] - index[0] == len(index) - 1:  # they ascend, so they are neighbours: a view
        return matrix.narrow(dim, int(index[0]), len(index))
    return matrix.index_select(dim, torch.from_numpy(np.ascontiguousarray(index)).to(matrix.device))


def _grid(rows: IntArray, columns: IntArray) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(index) for index in np.ix_(rows, columns))
