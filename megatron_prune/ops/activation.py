"""The gate of the MLP, ``silu(gate) * up``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Swiglu = Callable[[Tensor, Tensor], Tensor]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``; both ``[..., F]`` of one dtype, which the result has too."""
    return F.silu(gate) * up


def fused_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """:func:`swiglu` that keeps two tensors for the backward pass instead of three.

    ``silu(gate)`` is computed again in the backward pass: an element-wise pass bought with a third of the MLP's
    saved activations.
    """
    result: Tensor = _Swiglu.apply(gate, up)
    return result


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        (grad,) = grads
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
