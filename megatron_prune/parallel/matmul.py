"""The matrix products of the linear layers: of several layers at once where their weights lie side by side.

ZeRO keeps the weights of a process in one flat buffer in model order, so those of q, k and v, or of gate and up, are
neighbours: a view over them is the fused weight of other frameworks, without being a parameter of its own that pruning,
checkpoints and exports would have to take apart again.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def product_dtype(x: Tensor) -> torch.dtype:
    """What to form a tensor's products in: its own dtype, or fp32 where that is faster (bf16 on most CPUs)."""
    emulated = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _has_bf16_units()
    return torch.float32 if emulated else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, the product formed in :func:`product_dtype`.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]`` or None.

    Returns:
        ``[..., out]`` in the dtype of ``x``.
    """
    if product_dtype(x) == x.dtype:
        return functional.linear(x, weight, bias)
    product: Tensor = _JoinedLinear.apply(x, weight)
    return product if bias is None else product + bias


def linear_together(x: Tensor, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """The outputs of several linear layers of one input, from one product where their weights are neighbours.

    Args:
        x: ``[..., in]``.
        layers: all with a bias or all without.

    Returns:
        Their outputs ``[..., out]``, views of one tensor or tensors of their own.
    """
    weights = [layer.weight for layer in layers]
    if not _are_neighbours(weights):
        return tuple(linear(x, layer.weight, layer.bias) for layer in layers)
    product: Tensor = _JoinedLinear.apply(x, *weights)
    if layers[0].bias is not None:
        product = product + torch.cat([layer.bias for layer in layers])
    return product.split([len(weight) for weight in weights], dim=-1)


class _JoinedLinear(torch.autograd.Function):
    """The product with weights that are neighbours; one weight is its own neighbour."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        dtype = product_dtype(x)
        return (x.to(dtype) @ _joined(weights).to(dtype).T).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, *weights = ctx.saved_tensors
        dtype = product_dtype(x)
        grad = grads[0].to(dtype)
        d_x = (grad @ _joined(weights).to(dtype)).to(x.dtype)
        d_weight = (grad.flatten(0, -2).T @ x.to(dtype).flatten(0, -2)).to(weights[0].dtype)
        return d_x, *d_weight.split([len(weight) for weight in weights])


def _joined(weights: Sequence[Tensor]) -> Tensor:
    first = weights[0]
    rows = sum(len(weight) for weight in weights)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())


def _are_neighbours(weights: Sequence[Tensor]) -> bool:
    if not all(weight.is_contiguous() for weight in weights):
        return False
    storage = weights[0].untyped_storage().data_ptr()
    return all(
        after.untyped_storage().data_ptr() == storage
        and after.storage_offset() == before.storage_offset() + before.numel()
        for before, after in pairwise(weights)
    )


@functools.cache
def _has_bf16_units() -> bool:
    """True unless this is an x86 CPU that is known to emulate bf16 products."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    known = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(probe is None or probe() for probe in known)
