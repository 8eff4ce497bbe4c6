"""Grouped-query self-attention whose sizes follow a :class:`LayerShape`, and that shape.

Shapes: B batch, S sequence, D hidden, H query head slots, K key/value head slots, hd head_dim.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch import Tensor, nn

from megatron_prune.architecture import Architecture
from megatron_prune.model.masks import UnitMask
from megatron_prune.model.rope import RotaryTables, apply_rope
from megatron_prune.ops.dispatch import Ops
from megatron_prune.parallel.layers import ColumnParallelLinear, RowParallelLinear, TensorParallel
from megatron_prune.parallel.matmul import linear_together

#: Entry of ``kv_of_head`` for a query slot that is dead padding.
DEAD_HEAD: Final = -1


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Physical widths of one layer on one rank. They may exceed the logical ones by dead (zero) padding.

    Attributes:
        hidden: width of the stem.
        live_hidden: stem channels that are alive; the norms divide by it.
        ffn: width of the gated MLP.
        heads: query head slots.
        kv_heads: key/value head slots.
        kv_of_head: for every query slot the key/value slot it reads, or ``DEAD_HEAD`` for a dead query slot: its
            output is forced to zero, so that its columns of o_proj get a zero gradient even when its K/V head lives.
    """

    hidden: int
    live_hidden: int
    ffn: int
    heads: int
    kv_heads: int
    kv_of_head: tuple[int, ...]

    def __post_init__(self) -> None:
        assert 0 < self.live_hidden <= self.hidden, self
        assert len(self.kv_of_head) == self.heads, self
        assert all(DEAD_HEAD <= kv < self.kv_heads for kv in self.kv_of_head), self

    @property
    def grouped(self) -> bool:
        """True when every K/V slot serves the same number of consecutive query slots (MHA included).

        Dead query slots fit any group: what they read is discarded.
        """
        if self.heads % self.kv_heads:
            return False
        group = self.heads // self.kv_heads
        return all(kv in (DEAD_HEAD, slot // group) for slot, kv in enumerate(self.kv_of_head))


def logical_shapes(arch: Architecture) -> tuple[LayerShape, ...]:
    """The shapes of a model without any padding, one per layer."""
    return tuple(
        LayerShape(
            hidden=arch.hidden_size,
            live_hidden=arch.hidden_size,
            ffn=arch.ffn_hidden_size,
            heads=arch.num_attention_heads,
            kv_heads=arch.num_kv_heads(layer),
            kv_of_head=arch.kv_of_head(layer),
        )
        for layer in range(arch.num_layers)
    )


class RMSNorm(nn.Module):
    """Root mean square norm over the live channels of a possibly wider vector.

    Args:
        width: physical channels, the length of ``weight``.
        live_width: what the mean of squares divides by. Dead channels are zero and add nothing to the sum.
        eps: added to the mean of squares.
        ops: kernels to compute with.
    """

    def __init__(self, width: int, live_width: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.live_width = live_width
        self.eps = eps
        self.ops = ops
        self.mask: UnitMask | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x`` [..., width]; fp32 inside, dtype of ``x`` outside."""
        if self.mask is None:
            return self.ops.rms_norm(x, self.weight, self.eps, self.live_width)
        masked = x * self.mask.value(self.training, x.dtype)
        return self.ops.rms_norm(masked, self.weight, self.eps, self.mask.live(self.training))


class Attention(nn.Module):
    """Causal self-attention with rotary positions, on this rank's heads.

    Args:
        arch: gives head_dim, biases, q/k norms and window.
        shape: physical sizes.
        ops: kernels to compute with.
        tp: who has the other heads.
    """

    kv_index: Tensor
    live_heads: Tensor

    def __init__(self, arch: Architecture, shape: LayerShape, ops: Ops, tp: TensorParallel) -> None:
        super().__init__()
        self.head_dim = arch.head_dim
        self.window = arch.sliding_window
        self.ops = ops
        self.tp = tp
        q_width, kv_width = shape.heads * arch.head_dim, shape.kv_heads * arch.head_dim
        self.q_proj = ColumnParallelLinear(shape.hidden, q_width, bias=arch.qkv_bias)
        self.k_proj = ColumnParallelLinear(shape.hidden, kv_width, bias=arch.qkv_bias)
        self.v_proj = ColumnParallelLinear(shape.hidden, kv_width, bias=arch.qkv_bias)
        self.o_proj = RowParallelLinear(q_width, shape.hidden, bias=arch.out_bias, tp=tp)
        self.mask: UnitMask | None = None
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if arch.qk_norm:
            self.q_norm = RMSNorm(arch.head_dim, arch.head_dim, arch.norm_eps, ops)
            self.k_norm = RMSNorm(arch.head_dim, arch.head_dim, arch.norm_eps, ops)
        self.set_shape(shape)

    def set_shape(self, shape: LayerShape) -> None:
        """Follow new physical sizes. The caller replaces the parameters themselves."""
        device = self.q_proj.weight.device
        self.shape = shape
        self.has_dead_heads = DEAD_HEAD in shape.kv_of_head
        kv_index = torch.tensor(shape.kv_of_head, device=device)
        # Derived from the shape, so no part of the state dict.
        self.register_buffer("kv_index", kv_index.clamp_min(0), persistent=False)
        self.register_buffer("live_heads", (kv_index != DEAD_HEAD).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor, rotary: RotaryTables) -> Tensor:
        """Attend over the sequence, positions 0..S-1.

        Args:
            x: [B, S, D], or this rank's part of the sequence under sequence parallelism.
            rotary: tables.

        Returns:
            Shape and dtype of ``x``.
        """
        x = self.tp.enter(x)
        batch, seq_length, _ = x.shape
        cos, sin = rotary(seq_length, x.device, x.dtype)
        shape, head_dim = self.shape, self.head_dim
        q, k, v = linear_together(x, (self.q_proj, self.k_proj, self.v_proj))
        q = q.view(batch, seq_length, shape.heads, head_dim)
        k = k.view(batch, seq_length, shape.kv_heads, head_dim)
        v = v.view(batch, seq_length, shape.kv_heads, head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = apply_rope(q.transpose(1, 2), cos, sin)
        k = apply_rope(k.transpose(1, 2), cos, sin)
        if not shape.grouped:  # no stock kernel knows groups of different size: one K/V head per query head
            k, v = k.index_select(1, self.kv_index), v.index_select(1, self.kv_index)
        out = self.ops.attention(q, k, v, self.window)
        if self.has_dead_heads:
            out = out * self.live_heads
        if self.mask is not None:
            out = out * self.mask.value(self.training, out.dtype).view(-1, 1, 1)
        return self.o_proj(out.transpose(1, 2).reshape(batch, seq_length, shape.heads * head_dim))
