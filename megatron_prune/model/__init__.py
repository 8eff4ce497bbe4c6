"""The decoder's mathematics: layers whose physical sizes may exceed the logical ones by dead padding."""

from __future__ import annotations

from megatron_prune.model.attention import DEAD_HEAD, Attention, LayerShape, RMSNorm, logical_shapes
from megatron_prune.model.mlp import MLP
from megatron_prune.model.rope import RotaryTables, apply_rope, check_rope, inverse_frequencies
from megatron_prune.model.transformer import (
    CausalLM,
    DecoderLayer,
    LMHead,
    init_weights,
    initial_tensor,
)

__all__ = [
    "DEAD_HEAD",
    "MLP",
    "Attention",
    "CausalLM",
    "DecoderLayer",
    "LMHead",
    "LayerShape",
    "RMSNorm",
    "RotaryTables",
    "apply_rope",
    "check_rope",
    "init_weights",
    "initial_tensor",
    "inverse_frequencies",
    "logical_shapes",
]
