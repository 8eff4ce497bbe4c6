"""Output projection and cross-entropy in one, a chunk of tokens at a time: the full logits never exist.

At a vocabulary of 49,152 and 8 x 2,048 tokens the fp32 logits alone take 3.2 GB, more than every activation of a small
model. Here one chunk of them exists at a time, and its part of both gradients is formed at once, while it is there; the
backward pass only scales them. A vocabulary may be whole or split (see :mod:`~megatron_prune.parallel.vocab`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prune.parallel.layers import TensorParallel
from megatron_prune.parallel.matmul import product_dtype
from megatron_prune.parallel.vocab import local_rows

#: Bytes of logits that exist at a time: large enough for full-speed products, small beside the activations.
CHUNK_BYTES: Final = {"cpu": 96 << 20, "cuda": 512 << 20}
LEAST_CHUNK: Final = 128  # tokens
#: A label that does not count, for those who choose what goes into a loss; no function here takes it.
IGNORED: Final = -100

#: Turns a chunk's logits ``[n, valid]`` into the gradient of the sum of its tokens' losses in place, and gives these
#: losses ``[n]``; the slice says which tokens they are.
ChunkScore = Callable[[Tensor, slice], Tensor]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    first: int,
    valid: int,
    tp: TensorParallel,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Mean cross-entropy of ``hidden @ weight.T`` against labels.

    Args:
        hidden: ``[N, D]``, any floating dtype, the same on every rank: it went through :meth:`TensorParallel.enter`.
        weight: ``[rows, D]``, this rank's tokens; rows from ``valid`` on are padding and get a gradient of zero.
        labels: ``[N]`` int64, every one a token of some rank.
        first: first token id of this rank.
        valid: rows that hold a token, possibly 0.
        tp: who shares the vocabulary.
        chunk_tokens: tokens whose logits exist at a time; by default as many as ``CHUNK_BYTES`` hold.

    Returns:
        Scalar, the same on every rank, in at least fp32. Products are formed in
        :func:`~megatron_prune.parallel.matmul.product_dtype`; softmax, the loss and the running gradient of the weight
        are kept in at least fp32. Where that dtype is bf16 the probabilities less the labels are rounded to it before
        they are multiplied, and so is each chunk's product with the hidden states before it is added to the running
        gradient of the weight; the sum itself is rounded once, in the backward pass, to the dtype of the weight.
    """
    column, mine = local_rows(labels, first, valid)
    score = lambda logits, part: cross_entropy_(logits, column[part], mine[part], tp)  # noqa: E731
    return linear_loss(hidden, weight, valid, score, chunk_tokens)


def linear_loss(
    hidden: Tensor, weight: Tensor, valid: int, score: ChunkScore, chunk_tokens: int | None = None, chunks: int = 1
) -> Tensor:
    """Mean of a score of ``hidden @ weight.T`` over tokens, and its gradients, a chunk of tokens at a time.

    Args:
        hidden: as for :func:`linear_cross_entropy`.
        weight: likewise.
        valid: likewise.
        score: of a chunk's logits.
        chunk_tokens: likewise.
        chunks: arrays of a chunk's size that exist at a time, those of the score included.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if chunk_tokens is None:
        budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"])
        chunk_tokens = max(LEAST_CHUNK, budget // (chunks * wide.itemsize * len(weight)))
    loss: Tensor = _LinearLoss.apply(hidden, weight, valid, score, chunk_tokens, torch.is_grad_enabled())
    return loss


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        valid: int,
        score: ChunkScore,
        chunk_tokens: int,
        trains: bool,  # needs_input_grad is true of a weight under no_grad as well
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        live = weight[:valid].to(product_dtype(hidden))
        d_hidden = torch.empty_like(hidden) if trains else None
        d_weight = torch.zeros_like(weight, dtype=wide) if trains else None
        total = hidden.new_zeros((), dtype=wide)
        chunk = min(chunk_tokens, len(hidden))
        products = hidden.new_empty(chunk, valid, dtype=live.dtype)  # one buffer for all chunks: fresh pages cost time
        for start in range(0, len(hidden), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            entered = hidden[part].to(live.dtype)
            logits = torch.mm(entered, live.T, out=products[: len(entered)]).to(wide)
            total += score(logits, part).sum()
            if d_hidden is None or d_weight is None:
                del logits  # else they would lie beside the next chunk's
                continue
            narrow = products[: len(entered)].copy_(logits)
            del logits  # else they would lie beside a product as large as the weight, and then the next chunk's
            d_hidden[part] = narrow @ live
            _add_product_(d_weight[:valid], narrow, entered)
        if d_hidden is not None:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.weight_dtype = weight.dtype
            ctx.spent = False
        return total / len(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "the loss of the output projection can be differentiated once: its backward pass scales "
                "gradients in place"
            )
        ctx.spent = True
        d_hidden, d_weight = ctx.saved_tensors
        scale = grads[0] / len(d_hidden)
        # In place: a second matrix of the vocabulary would be the peak of the whole step.
        d_hidden.mul_(scale.to(d_hidden.dtype))
        return d_hidden, d_weight.mul_(scale).to(ctx.weight_dtype), None, None, None, None


def cross_entropy_(logits: Tensor, column: Tensor, mine: Tensor, tp: TensorParallel) -> Tensor:
    """The :data:`ChunkScore` of cross-entropy.

    Args:
        logits: ``[n, valid]``, fp32 or wider.
        column: ``[n]`` row of each label on this rank.
        mine: ``[n]`` whether it is on this rank.
        tp: who shares the vocabulary.
    """
    losses = _softmax_(logits, column, mine, tp)
    if logits.shape[1]:
        logits.scatter_add_(1, column.unsqueeze(1), -mine.unsqueeze(1).to(logits.dtype))
    return losses


def _softmax_(logits: Tensor, column: Tensor, mine: Tensor, tp: TensorParallel) -> Tensor:
    """Turn a chunk's logits ``[n, valid]`` into probabilities over the whole vocabulary in place; losses ``[n]``."""
    empty = not logits.shape[1]
    top = logits.new_full((len(logits),), -torch.inf) if empty else logits.amax(dim=1)
    if tp.size > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp.group)
    logits.sub_(top.unsqueeze(1))
    chosen = torch.zeros_like(top) if empty else logits.gather(1, column.unsqueeze(1)).squeeze(1).masked_fill(~mine, 0)
    sums = torch.stack([logits.exp_().sum(dim=1), chosen])
    if tp.size > 1:
        dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=tp.group)
    logits.div_(sums[0].unsqueeze(1))
    return sums[0].log() - sums[1]


def _add_product_(total: Tensor, narrow: Tensor, hidden: Tensor) -> None:
    """``total += narrow.T @ hidden`` in the precision of the total."""
    if total.dtype == narrow.dtype:
        total.addmm_(narrow.T, hidden)
    else:
        total.add_(narrow.T @ hidden)
