"""RMSNorm over the live part of a zero-padded width.

Removed stem channels stay in the tensor as zeros until the next compaction. They add nothing to the sum of squares,
so dividing that sum by the live width gives exactly the norm of the sliced model. Library kernels divide by the
physical width ``P`` instead; with ``L`` live channels,

    x / sqrt(sum/L + eps) = sqrt(L/P) * x / sqrt(sum/P + eps * L/P),

so they serve too, with a smaller epsilon and one scalar factor on the output.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

RmsNorm = Callable[[Tensor, Tensor, float, int], Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float, live_width: int) -> Tensor:
    """Root-mean-square norm in plain PyTorch.

    Args:
        x: ``[..., P]``, any floating dtype; channels beyond the live ones are zero.
        weight: ``[P]`` gains.
        eps: added to the mean square.
        live_width: channels the mean is taken over, ``<= P``.

    Returns:
        ``[..., P]``; statistics in at least fp32, cast to the input's dtype before the gain is applied, as Hugging
        Face's Llama does.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = wide.square().sum(-1, keepdim=True) / live_width
    return weight * (wide * torch.rsqrt(mean_square + eps)).to(x.dtype)


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float, live_width: int) -> Tensor:
    """:func:`rms_norm` through ``torch.nn.functional.rms_norm`` (one kernel where the backend has one)."""
    return _on_physical_width(lambda value, gain, e: F.rms_norm(value, gain.shape, gain, e), x, weight, eps, live_width)


def load_transformer_engine() -> RmsNorm:
    """:func:`rms_norm` through ``transformer_engine.pytorch.RMSNorm``.

    The gain must be an ``nn.Parameter``.

    Raises:
        ImportError: Transformer Engine is not installed.
    """
    module_type = importlib.import_module("transformer_engine.pytorch").RMSNorm

    def call(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # The library only offers a module that owns its gain, and its backward pass reads the gain from the module
        # again: so a module is built around our parameter for every call (meta device: no memory, no kernel).
        module = module_type(weight.numel(), eps=eps, dtype=weight.dtype, device="meta")
        module.weight = weight
        result: Tensor = module(x)
        return result

    return lambda x, weight, eps, live_width: _on_physical_width(call, x, weight, eps, live_width)


def load_apex() -> RmsNorm:
    """:func:`rms_norm` through NVIDIA apex's fused affine RMSNorm.

    Raises:
        ImportError: NVIDIA apex or its CUDA extension is missing (PyPI's ``apex`` is another project).
    """
    # apex imports its CUDA part at the first call; asking for it here makes a Python-only build show now.
    importlib.import_module("fused_layer_norm_cuda")
    affine = importlib.import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine

    def call(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        result: Tensor = affine(x, weight, weight.shape, eps)
        return result

    return lambda x, weight, eps, live_width: _on_physical_width(call, x, weight, eps, live_width)


def _on_physical_width(
    kernel: Callable[[Tensor, Tensor, float], Tensor], x: Tensor, weight: Tensor, eps: float, live_width: int
) -> Tensor:
    width = x.shape[-1]
    if live_width == width:
        return kernel(x, weight, eps)
    live = live_width / width
    # Scaling the output and not the gain: a gain rounded to bf16 would be off the same way at every token.
    return kernel(x, weight, eps * live) * math.sqrt(live)
