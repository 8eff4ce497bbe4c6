"""Embedding split over the vocabulary: rank ``r`` holds the tokens ``[first, first + valid)``.

Every rank has the same number of ``rows``; those from ``valid`` on are padding, which is never looked up, never
predicted and never trained. ``valid`` may be 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_prune.parallel.layers import TensorParallel


class VocabParallelEmbedding(nn.Module):
    """This rank's tokens of an embedding, ``weight`` ``[rows, D]``; the ranks' look-ups are summed.

    A tied head multiplies ``tp.enter(x)`` by the same weight, see
    :func:`~megatron_prune.parallel.linear_loss.linear_cross_entropy`. The gradient is whole per rank, also under
    sequence parallelism.
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
        row, mine = local_rows(ids, self.first, self.valid)
        found = nn.functional.embedding(row, self.weight)
        # A fill, not a product: whatever row 0 holds, even NaN, it adds exactly nothing in either pass.
        return self.tp.leave(found.masked_fill(~mine.unsqueeze(-1), 0))


def local_rows(tokens: Tensor, first: int, valid: int) -> tuple[Tensor, Tensor]:
    """Row of each token on this rank (0 for one of another rank) and whether it is of this rank."""
    row = tokens - first
    mine = (row >= 0) & (row < valid)
    return row.where(mine, 0), mine
