"""The gated MLP: ``down(silu(gate(x)) * up(x))``."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_prune.architecture import Architecture
from megatron_prune.model.attention import LayerShape
from megatron_prune.model.masks import UnitMask
from megatron_prune.ops.dispatch import Ops
from megatron_prune.parallel.layers import ColumnParallelLinear, RowParallelLinear, TensorParallel
from megatron_prune.parallel.matmul import linear_together


class MLP(nn.Module):
    """Gated feed-forward block, on this rank's channels.

    Args:
        arch: says whether the projections have biases.
        shape: physical sizes.
        ops: kernels to compute with.
        tp: who has the other channels.
    """

    def __init__(self, arch: Architecture, shape: LayerShape, ops: Ops, tp: TensorParallel) -> None:
        super().__init__()
        self.gate_proj = ColumnParallelLinear(shape.hidden, shape.ffn, bias=arch.mlp_bias)
        self.up_proj = ColumnParallelLinear(shape.hidden, shape.ffn, bias=arch.mlp_bias)
        self.down_proj = RowParallelLinear(shape.ffn, shape.hidden, bias=arch.mlp_bias, tp=tp)
        self.ops = ops
        self.tp = tp
        self.mask: UnitMask | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, S, D] to [B, S, D]. Dead channels are zero in and out: silu(0) * 0 = 0."""
        gate, up = linear_together(self.tp.enter(x), (self.gate_proj, self.up_proj))
        product = self.ops.swiglu(gate, up)
        if self.mask is not None:
            product = product * self.mask.value(self.training, product.dtype)
        return self.down_proj(product)
