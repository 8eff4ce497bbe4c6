"""Cross-entropy of next-token prediction, the mean over all rows: from logits, or from the head's input and weight."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_prune.parallel.layers import TensorParallel
from megatron_prune.parallel.linear_loss import linear_cross_entropy

#: ``logits [N, V], labels [N] -> loss``
CrossEntropy = Callable[[Tensor, Tensor], Tensor]
#: ``hidden [N, D], weight [V, D], labels [N] -> loss``
HeadLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The whole vocabulary's :func:`~megatron_prune.parallel.linear_loss.linear_cross_entropy`.

    Args:
        hidden: ``[N, D]``, what the output projection multiplies.
        weight: ``[V, D]`` of the output projection.
        labels: ``[N]`` int64.
    """
    return linear_cross_entropy(hidden, weight, labels, 0, len(weight), TensorParallel())


def on_logits(kernel: CrossEntropy) -> HeadLoss:
    """A loss of the head's input from one that takes logits, which then exist in full."""
    return lambda hidden, weight, labels: kernel(F.linear(hidden, weight), labels)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of ``logsumexp(row) - row[label]``.

    Args:
        logits: ``[N, V]``, any floating dtype; computed in at least fp32.
        labels: ``[N]`` int64, every one in ``[0, V)`` (none is ignored).

    Returns:
        Scalar, fp32 (fp64 for fp64 logits).
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = wide.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (torch.logsumexp(wide, dim=-1) - chosen).mean()


def fused_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """:func:`cross_entropy` through ``torch.nn.functional.cross_entropy``."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def load_transformer_engine() -> CrossEntropy:
    """:func:`cross_entropy` through Transformer Engine's Triton kernel.

    The kernel writes the gradient over the logits, which saves a copy of the largest tensor of a step; the caller
    must not read the logits afterwards.

    Raises:
        ImportError: Transformer Engine (with its cross-entropy) is not installed.
    """
    kernel = importlib.import_module("transformer_engine.pytorch.cross_entropy").parallel_cross_entropy

    no_smoothing, mean = 0.0, True

    def call(logits: Tensor, labels: Tensor) -> Tensor:
        # Positional: in some versions this name is an autograd function's ``apply``, which takes no keywords.
        result: Tensor = kernel(logits.unsqueeze(0), labels.unsqueeze(0), no_smoothing, mean)
        return result

    return call


def load_apex() -> CrossEntropy:
    """:func:`cross_entropy` through NVIDIA apex's contributed fused kernel.

    Raises:
        ImportError: NVIDIA apex was built without ``xentropy`` or is missing.
    """
    kernel = importlib.import_module("apex.contrib.xentropy").SoftmaxCrossEntropyLoss
    no_smoothing, ignore_nothing = 0.0, -1

    def call(logits: Tensor, labels: Tensor) -> Tensor:
        # The kernel's half-to-float flag is an error for logits that are fp32 already.
        to_fp32 = logits.dtype != torch.float32
        per_row: Tensor = kernel.apply(logits, labels, no_smoothing, ignore_nothing, to_fp32)
        return per_row.mean()

    return call
