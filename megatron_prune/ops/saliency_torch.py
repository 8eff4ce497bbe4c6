"""The saliency sums written out in PyTorch: what runs where the compiled kernels are missing, and what checks them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_prune.ops.saliency import DTYPE_CODES, Kind, Piece, RowAndColumnSums, Saliency
from megatron_prune.parallel.placement import Block, blocks

#: Elements of a block that is scored at once: the fp32 temporaries stay near a megabyte.
BLOCK_ELEMENTS = 1 << 18


class TorchSaliency(Saliency):
    """Written out in PyTorch, for any device; takes fp64 too, and then computes in it."""

    dtypes = (*DTYPE_CODES, torch.float64)
    hessian_dtypes = (torch.float32, torch.float64)

    def _score(self, pieces: Sequence[Piece], kind: Kind, sums: Sequence[RowAndColumnSums]) -> None:
        for piece, out in zip(pieces, sums, strict=True):
            _sum_blocks(piece, out, functools.partial(_scores, piece, kind))

    def _square_add(self, grads: Sequence[Tensor], totals: Sequence[Tensor]) -> None:
        for grad, total in zip(grads, totals, strict=True):
            parts = zip(total.view(-1).split(BLOCK_ELEMENTS), grad.view(-1).split(BLOCK_ELEMENTS), strict=True)
            for total_part, grad_part in parts:
                wide = grad_part.float()
                total_part.addcmul_(wide, wide)

    def _column_square_sums(self, inputs: Sequence[Tensor], totals: Sequence[Tensor]) -> None:
        for x, total in zip(inputs, totals, strict=True):
            for part in x.split(max(1, BLOCK_ELEMENTS // x.shape[1])):
                total += _wide(part).square().sum(0, dtype=torch.float64)

    def _wanda(self, pieces: Sequence[Piece], norms: Sequence[Tensor], sums: Sequence[RowAndColumnSums]) -> None:
        for piece, norm, out in zip(pieces, norms, sums, strict=True):
            _sum_blocks(piece, out, functools.partial(_wanda_scores, piece, norm))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sum_blocks(piece: Piece, out: RowAndColumnSums, scores: Callable[[Block], Tensor]) -> None:
    rows, columns = out
    rows.zero_()
    columns.zero_()
    for block in _small_blocks(piece):
        values = scores(block)
        first = block.rows.start - piece.first_row
        rows[first : first + values.shape[0]] += values.sum(1, dtype=torch.float64)
        columns[block.columns] += values.sum(0, dtype=torch.float64)


def _small_blocks(piece: Piece) -> Iterator[Block]:
    """The rectangles of a piece, whole rows in portions."""
    most = max(1, BLOCK_ELEMENTS // piece.columns)
    for block in blocks(piece.start, piece.weight.numel(), piece.columns):
        width = block.columns.stop - block.columns.start
        for row in range(block.rows.start, block.rows.stop, most):
            stop = min(row + most, block.rows.stop)
            flat = block.flat.start + (row - block.rows.start) * width
            yield Block(slice(row, stop), block.columns, slice(flat, flat + (stop - row) * width))


def _scores(piece: Piece, kind: Kind, block: Block) -> Tensor:
    weight = _wide(block.view(piece.weight))
    if kind is Kind.MAGNITUDE:
        return weight.abs()
    if kind is Kind.DIAG_HESSIAN:
        return 0.5 * weight.square() * _operand_block(piece.hessian, block)
    grad = _operand_block(piece.grad, block)
    if kind is Kind.SIGNED:
        return weight * grad
    if kind is Kind.TAYLOR:
        return (weight * grad).abs_()
    # In fp64, where the product of two fp32 numbers is exact: the two terms may all but cancel.
    bracket = (0.5 * weight).double() * _operand_block(piece.hessian, block).double() - grad.double()
    return (weight.double() * bracket).abs_()


def _operand_block(operand: Tensor | None, block: Block) -> Tensor:
    assert operand is not None, "checked before"
    return _wide(block.view(operand))


def _wanda_scores(piece: Piece, norm: Tensor, block: Block) -> Tensor:
    return _wide(block.view(piece.weight)).abs() * norm[block.columns]
