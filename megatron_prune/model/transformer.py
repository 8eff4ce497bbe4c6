"""The decoder: its layers, the whole model for one process, and its random start. No process group in sight.

Parameter names are Hugging Face's. Shapes: B batch, S sequence, D hidden (physical), V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_prune.architecture import Architecture
from megatron_prune.model.attention import Attention, LayerShape, RMSNorm
from megatron_prune.model.masks import ModelMasks
from megatron_prune.model.mlp import MLP
from megatron_prune.model.rope import RotaryTables
from megatron_prune.ops.dispatch import Ops
from megatron_prune.parallel.layers import TensorParallel
from megatron_prune.parallel.vocab import VocabParallelEmbedding

INIT_STD: Final = 0.02  # GPT-2's and Llama's initializer_range
SEED_BYTES: Final = 7  # a 56-bit seed: torch generators take a signed 64-bit integer
#: Projections that write into the residual stream; their spread shrinks with depth (GPT-2).
RESIDUAL_PROJECTIONS: Final = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


class LMHead(nn.Module):
    """Output projection to this rank's tokens, ``weight`` [rows, D]; a tied head is the embedding instead.

    Args:
        rows: physical rows of this rank.
        hidden: D.
        tp: who has the other tokens.
    """

    def __init__(self, rows: int, hidden: int, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, hidden))
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, S, D] to logits [B, S, rows]."""
        return logits(self, x)


def logits(owner: LMHead | VocabParallelEmbedding, x: Tensor) -> Tensor:
    """Logits [B, S, rows] of whatever owns the ``weight`` [rows, D]."""
    return functional.linear(owner.tp.enter(x), owner.weight)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residual connections.

    Args:
        arch: what the model is.
        shape: physical sizes of this layer.
        ops: kernels to compute with.
        tp: who has the other heads and channels.
        rotary: tables to share between layers; own ones when None.
    """

    def __init__(
        self,
        arch: Architecture,
        shape: LayerShape,
        ops: Ops,
        tp: TensorParallel,
        rotary: RotaryTables | None = None,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.live_hidden, arch.norm_eps, ops)
        self.self_attn = Attention(arch, shape, ops, tp)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.live_hidden, arch.norm_eps, ops)
        self.mlp = MLP(arch, shape, ops, tp)
        self.rotary = rotary or RotaryTables(arch)

    @property
    def shape(self) -> LayerShape:
        """Current physical sizes."""
        return self.self_attn.shape

    def set_shape(self, shape: LayerShape) -> None:
        """Follow new physical sizes. The caller replaces the parameters themselves."""
        self.self_attn.set_shape(shape)
        self.input_layernorm.live_width = shape.live_hidden
        self.post_attention_layernorm.live_width = shape.live_hidden

    def set_masks(self, masks: ModelMasks, layer: int) -> None:
        """Take the masks of decoder layer ``layer`` of a model."""
        self.input_layernorm.mask = self.post_attention_layernorm.mask = masks.stem
        self.self_attn.mask = None if masks.heads is None else masks.heads[layer]
        self.mlp.mask = None if masks.ffn is None else masks.ffn[layer]

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, S, D], or under sequence parallelism this rank's part of the sequence, to the same."""
        x = x + self.self_attn(self.input_layernorm(x), self.rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and last norm: Hugging Face's ``model.`` part.

    Args:
        arch: what the model is.
        shapes: physical sizes, one per layer, of equal stem width.
        ops: kernels to compute with.
    """

    def __init__(self, arch: Architecture, shapes: Sequence[LayerShape], ops: Ops) -> None:
        super().__init__()
        assert len(shapes) == arch.num_layers, (len(shapes), arch.num_layers)
        assert len({(shape.hidden, shape.live_hidden) for shape in shapes}) == 1, "one stem runs through all layers"
        rotary, alone = RotaryTables(arch), TensorParallel()
        vocab = arch.vocab_size
        self.embed_tokens = VocabParallelEmbedding(vocab, 0, vocab, shapes[0].hidden, alone)
        self.layers = nn.ModuleList([DecoderLayer(arch, shape, ops, alone, rotary) for shape in shapes])
        self.norm = RMSNorm(shapes[0].hidden, shapes[0].live_hidden, arch.norm_eps, ops)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map int64 [B, S] to normed hidden states [B, S, D]."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class CausalLM(nn.Module):
    """The whole model on one process; state dict keys are the Hugging Face names, a tied head has none.

    Args:
        arch: what the model is.
        shapes: physical sizes, one per layer; :func:`logical_shapes` for a model without padding.
        ops: kernels to compute with.
    """

    def __init__(self, arch: Architecture, shapes: Sequence[LayerShape], ops: Ops) -> None:
        super().__init__()
        self.model = Decoder(arch, shapes, ops)
        self.lm_head = None if arch.tie_embeddings else LMHead(arch.vocab_size, shapes[0].hidden, TensorParallel())

    def set_shapes(self, shapes: Sequence[LayerShape]) -> None:
        """Follow new physical sizes in every layer and the last norm. The caller replaces the parameters."""
        for layer, shape in zip(self.model.layers, shapes, strict=True):
            assert isinstance(layer, DecoderLayer)
            layer.set_shape(shape)
        self.model.norm.live_width = shapes[0].live_hidden

    def set_masks(self, masks: ModelMasks) -> None:
        """Multiply by masks from now on."""
        for layer, module in enumerate(self.model.layers):
            assert isinstance(module, DecoderLayer)
            module.set_masks(masks, layer)
        self.model.norm.mask = masks.stem

    def forward(self, tokens: Tensor) -> Tensor:
        """Map int64 [B, S] to logits [B, S, V] in the dtype of the weights."""
        x = self.model(tokens)
        found: Tensor = logits(self.model.embed_tokens, x) if self.lm_head is None else self.lm_head(x)
        return found


def initial_tensor(name: str, shape: Sequence[int], seed: int, num_layers: int) -> Tensor:
    """Random start of one tensor, a function of its name, logical shape and the seed only.

    Any partition of the model over processes therefore starts from the same weights.

    Args:
        name: Hugging Face name.
        shape: logical shape.
        seed: of the run.
        num_layers: depth of the model; o_proj and down_proj are scaled by ``1 / sqrt(2 * num_layers)``.

    Returns:
        fp32 CPU tensor: ones for norm gains, zeros for biases, else normal with mean 0 and deviation 0.02.
    """
    if name.endswith(".bias"):
        return torch.zeros(*shape)
    if len(shape) == 1:
        return torch.ones(*shape)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=SEED_BYTES).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    std = INIT_STD / math.sqrt(2 * num_layers) if name.endswith(RESIDUAL_PROJECTIONS) else INIT_STD
    return torch.empty(*shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def init_weights(module: nn.Module, arch: Architecture, seed: int, prefix: str = "") -> None:
    """Fill every parameter of an unpadded module in place with :func:`initial_tensor`.

    Args:
        module: a :class:`CausalLM`, or a part of one.
        arch: gives the depth.
        seed: of the run.
        prefix: what the names inside ``module`` lack to be Hugging Face names, e.g. ``model.layers.3.``.
    """
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_tensor(prefix + name, parameter.shape, seed, arch.num_layers))
