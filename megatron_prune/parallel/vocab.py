"""Embedding and loss split over the vocabulary: rank ``r`` holds the tokens ``[first, first + valid)``.

Every rank has the same number of ``rows``; those from ``valid`` on are padding, which is never looked up, never
predicted and never trained. ``valid`` may be 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_prune.parallel.layers import TensorParallel


class VocabParallelEmbedding(nn.Module):
    """This rank's tokens of an embedding, ``weight`` ``[rows, D]``; the ranks' look-ups are summed.

    A tied head multiplies by the same weight: ``linear(tp.enter(x), weight)`` gives the ``[B, S, rows]`` logits that
    :func:`vocab_parallel_cross_entropy` takes. The gradient is whole per rank, also under sequence parallelism.
    """

    def __init__(self, rows: int, first: int, valid: int, hidden: int, tp: TensorParallel) -> None:
        """Make the table, standard-normal as in ``nn.Embedding``, padding included.

        Args:
            rows: physical rows of this rank, at least 1.
            first: first token id of this rank.
            valid: how many rows hold a token.
            hidden: ``D``.
            tp: who sums.
        """
        super().__init__()
        assert rows > 0, "every rank has the same number of rows, padding where tokens run out"
        assert 0 <= valid <= rows, f"{valid} valid of {rows} rows"
        self.first, self.valid, self.tp = first, valid, tp
        self.weight = nn.Parameter(torch.empty(rows, hidden))
        nn.init.normal_(self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up.

        Args:
            ids: ``[B, S]`` int64, the same on every rank, every one a token of some rank (data preparation checks
                this; looking here would make the host wait for the GPU).

        Returns:
            ``[B, S | S/size, D]``.
        """
        if self.tp.size == 1:
            return nn.functional.embedding(ids, self.weight)
        row, mine = _local(ids, self.first, self.valid)
        found = nn.functional.embedding(row, self.weight)
        # A fill, not a product: whatever row 0 holds, even NaN, it adds exactly nothing in either pass.
        return self.tp.leave(found.masked_fill(~mine.unsqueeze(-1), 0))


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, first: int, valid: int, tp: TensorParallel) -> Tensor:
    """Mean of ``logsumexp(row) - row[label]`` over rows whose columns are spread over the ranks.

    Two collectives, of ``[N]`` and ``[2, N]`` values; the backward pass has none. Between the passes it keeps one
    ``[N, rows]`` buffer of the wide type and not the logits.

    Args:
        logits: ``[N, rows]``, any floating dtype; computed in at least fp32. Columns from ``valid`` on are ignored,
            whatever they hold, and get a gradient of exactly zero.
        labels: ``[N]`` int64, the same on every rank, every one a token of some rank (none is ignored).
        first: first token id of this rank.
        valid: how many columns hold a token.
        tp: who shares the rows.

    Returns:
        Scalar, the same on every rank: fp32 (fp64 for fp64 logits).
    """
    loss: Tensor = _CrossEntropy.apply(logits, labels, first, valid, tp)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, valid: int, tp: TensorParallel) -> Tensor:
        column, mine = _local(labels, first, valid)
        wide = torch.promote_types(logits.dtype, torch.float32)
        table = logits.to(wide, copy=True, memory_format=torch.contiguous_format)
        live = table[:, :valid]
        table[:, valid:] = 0
        top = live.amax(dim=1) if valid else table.new_full((len(table),), -torch.inf)
        if tp.size > 1:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp.group)
        live.sub_(top.unsqueeze(1))
        chosen = table.gather(1, column.unsqueeze(1)).squeeze(1).masked_fill(~mine, 0)
        sums = torch.stack([live.exp_().sum(dim=1), chosen])
        if tp.size > 1:
            dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=tp.group)
        live.div_(sums[0].unsqueeze(1))
        ctx.save_for_backward(table, column, mine)
        ctx.logits_dtype = logits.dtype
        return (sums[0].log() - sums[1]).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        softmax, column, mine = ctx.saved_tensors
        scale = grads[0] / len(softmax)
        # The product is rounded into the narrow result directly; a second wide table would double the peak.
        result = torch.mul(softmax, scale, out=torch.empty_like(softmax, dtype=ctx.logits_dtype))
        target = softmax.gather(1, column.unsqueeze(1)) - mine.unsqueeze(1).to(softmax.dtype)
        result.scatter_(1, column.unsqueeze(1), (target * scale).to(result.dtype))
        return result, None, None, None, None


def _local(tokens: Tensor, first: int, valid: int) -> tuple[Tensor, Tensor]:
    """Row of each token on this rank (0 for one of another rank) and whether it is of this rank."""
    row = tokens - first
    mine = (row >= 0) & (row < valid)
    return row.where(mine, 0), mine
