"""The loss of a model that learns from data and from a frozen teacher at once, a chunk of tokens at a time.

``(1 - W) * cross-entropy + W * T^2 * KL(softmax(t / T) || softmax(s / T))``, the mean over tokens, where ``t`` and
``s`` are the logits of teacher and student (Hinton et al. 2015). ``T^2`` keeps the size of the second gradient, which
the division by ``T`` would shrink. Both output projections are multiplied here, so that nobody's logits
ever exist in full, and both split the vocabulary in the same way.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.parallel.layers import TensorParallel
from megatron_prune.parallel.linear_loss import cross_entropy_, linear_loss
from megatron_prune.parallel.matmul import product_dtype
from megatron_prune.parallel.vocab import local_rows

#: Arrays of a chunk's size at a time: logits, and in fp32 the student's soft ones, the teacher's, a product of both.
CHUNKS = 4


@dataclasses.dataclass(frozen=True)
class Guide:
    """The teacher's end, where the loss is computed.

    Attributes:
        weight: ``[rows, D]`` of the teacher's output projection: this rank's tokens.
        share: ``W``, from 0 to 1.
        temperature: ``T``.
    """

    weight: Tensor
    share: float
    temperature: float


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    taught: Tensor,
    guide: Guide,
    first: int,
    valid: int,
    tp: TensorParallel,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Mean loss of the student ``hidden @ weight.T`` against labels and teacher.

    Args:
        hidden: ``[N, D]`` of the student, see :func:`~megatron_prune.parallel.linear_loss.linear_cross_entropy`.
        weight: ``[rows, D]`` of its output projection.
        labels: ``[N]`` int64.
        taught: ``[N, D of the teacher]``, what the teacher's output projection multiplies; the same on every rank.
        guide: the teacher's output projection, and how much it counts.
        first: first token id of this rank.
        valid: rows that hold a token, possibly 0.
        tp: who shares the vocabulary.
        chunk_tokens: tokens whose logits exist at a time.

    Returns:
        Scalar, the same on every rank, in at least fp32; the student's gradients go through it, the teacher has none.
    """
    column, mine = local_rows(labels, first, valid)
    dtype = product_dtype(taught)
    teacher = guide.weight[:valid].to(dtype)
    share, temperature = guide.share, guide.temperature

    def score(logits: Tensor, part: slice) -> Tensor:
        known = (taught[part].to(dtype) @ teacher.T).to(logits.dtype)
        _log_softmax_(known.div_(temperature), tp)
        learned = logits / temperature
        _log_softmax_(learned, tp)
        divergence = (known.exp() * known.sub(learned)).sum(dim=1)
        if tp.size > 1:
            dist.all_reduce(divergence, op=dist.ReduceOp.SUM, group=tp.group)
        losses = cross_entropy_(logits, column[part], mine[part], tp).mul_(1 - share)
        logits.mul_(1 - share).add_(learned.exp_().sub_(known.exp_()), alpha=share * temperature)
        return losses.add_(divergence, alpha=share * temperature**2)

    return linear_loss(hidden, weight, valid, score, chunk_tokens, chunks=CHUNKS)


def _log_softmax_(logits: Tensor, tp: TensorParallel) -> None:
    """Turn a chunk's logits ``[n, valid]`` into log-probabilities over the whole vocabulary, in place."""
    top = logits.amax(dim=1) if logits.shape[1] else logits.new_full((len(logits),), -torch.inf)
    if tp.size > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp.group)
    logits.sub_(top.unsqueeze(1))
    total = logits.exp().sum(dim=1)
    if tp.size > 1:
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=tp.group)
    logits.sub_(total.log_().unsqueeze(1))
