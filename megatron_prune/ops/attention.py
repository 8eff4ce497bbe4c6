"""Causal attention with grouped KV heads and an optional sliding window.

Shapes, everywhere: ``q [B, H, S, hd]``, ``k`` and ``v`` ``[B, Hkv, S, hd]``. ``Hkv`` divides ``H`` and query head
``i`` reads KV head ``i // (H / Hkv)``. With a window ``w`` a position sees itself and the ``w - 1`` before it.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Attention = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Softmax attention written out, scores ``[B, H, S, S]`` in memory, softmax in at least fp32.

    Args:
        q: ``[B, H, S, hd]``.
        k: ``[B, Hkv, S, hd]``.
        v: ``[B, Hkv, S, hd]``.
        window: positions a token sees, itself included; None, or S and more, for all before it.

    Returns:
        ``[B, H, S, hd]`` in the dtype of ``q``.
    """
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~visible(q.shape[-2], window, q.device), -math.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """:func:`attention` through PyTorch's scaled_dot_product_attention (flash kernels where they apply)."""
    length = q.shape[-2]
    grouped = q.shape[1] != k.shape[1]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    mask = visible(length, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean ``[length, length]``: True where the row's position may look at the column's."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    causal = ones.tril()
    return causal if window is None else causal & ones.triu(1 - window)


def load_transformer_engine() -> Attention:
    """:func:`attention` through ``transformer_engine.pytorch.DotProductAttention`` (flash or cuDNN kernels).

    Raises:
        ImportError: Transformer Engine is not installed.
    """
    module_type = importlib.import_module("transformer_engine.pytorch").DotProductAttention

    @functools.cache
    def module(num_heads: int, head_dim: int, num_kv_heads: int) -> torch.nn.Module:
        built: torch.nn.Module = module_type(
            num_heads, head_dim, num_gqa_groups=num_kv_heads, attention_dropout=0.0, qkv_format="bshd"
        )
        return built

    def call(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        batch, num_heads, length, head_dim = q.shape
        # The library's window counts the positions to the left, without the token itself; -1 is no limit.
        left = -1 if window is None or window >= length else window - 1
        inputs = (tensor.transpose(1, 2).contiguous() for tensor in (q, k, v))
        output: Tensor = module(num_heads, head_dim, k.shape[1])(
            *inputs, attn_mask_type="causal", window_size=(left, 0)
        )
        return output.view(batch, length, num_heads, head_dim).transpose(1, 2)

    return call
