"""The gated MLP: ``down(silu(gate(x)) * up(x))``."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_prune.architecture import Architecture
from megatron_prune.model.attention import LayerShape
from megatron_prune.ops.dispatch import Ops


class MLP(nn.Module):
    """Gated feed-forward block.

    Args:
        arch: says whether the projections have biases.
        shape: physical sizes.
        ops: kernels to compute with.
    """

    def __init__(self, arch: Architecture, shape: LayerShape, ops: Ops) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=arch.mlp_bias)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=arch.mlp_bias)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=arch.mlp_bias)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, S, D] to [B, S, D]. Dead channels are zero in and out: silu(0) * 0 = 0."""
        return self.down_proj(self.ops.swiglu(self.gate_proj(x), self.up_proj(x)))
