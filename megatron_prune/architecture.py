"""What a model *is*: a frozen value with its logical widths, its tensors and their axes.

Nothing here knows of processes, padding or weights. The axis table of :func:`tensor_specs` is the one place that
says which dimension of which tensor shrinks when a head, an FFN channel or a stem channel goes (paper, Eqs. 4-6);
surgery, sharding, checkpoints and the Hugging Face converter all read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Family = Literal["llama", "mistral", "qwen2", "qwen3"]

#: The logical axes a tensor dimension can have. ``heads`` and ``kv_heads`` dimensions count heads * head_dim.
Axis = Literal["stem", "ffn", "heads", "kv_heads", "head_dim", "vocab"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding settings.

    Attributes:
        theta: base of the geometric progression of wavelengths.
        kind: ``default``, ``linear``, ``llama3`` or ``yarn`` (Hugging Face ``rope_type``).
        options: the remaining Hugging Face ``rope_scaling`` keys, sorted by name.
    """

    theta: float = 10000.0
    kind: str = "default"
    options: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One parameter of the model.

    Attributes:
        name: the Hugging Face name, which is this project's logical name too.
        axes: one logical axis per dimension, PyTorch layout ``[out, in]``.
        layer: decoder layer index, or None for tensors outside the layers.
    """

    name: str
    axes: tuple[Axis, ...]
    layer: int | None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Logical (live) shape of a decoder of the Llama kind.

    Attributes:
        family: which Hugging Face architecture the tensors follow.
        num_layers: decoder layers.
        hidden_size: width of the stem.
        ffn_hidden_size: width of the gated MLP, equal in every layer.
        num_attention_heads: query heads, equal in every layer.
        kv_groups: for every layer, how many consecutive query heads share each KV head, e.g. ``((3, 3), (3, 3))``.
            Sums to ``num_attention_heads``; layers may differ in the number of KV heads (paper B.4).
        head_dim: width of a head, independent of ``hidden_size``.
        vocab_size: rows of the embedding.
        max_position_embeddings: longest position the source was made for; only carried to exports.
        norm_eps: epsilon of every RMSNorm.
        rope: rotary embedding settings.
        tie_embeddings: the output head is the embedding.
        qkv_bias: q, k and v projections have biases (Qwen2).
        out_bias: the attention output projection has a bias.
        mlp_bias: gate, up and down projections have biases.
        qk_norm: per-head RMSNorm of q and k (Qwen3).
        sliding_window: attention window in tokens, or None for full attention.
    """

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    kv_groups: tuple[tuple[int, ...], ...]
    head_dim: int
    vocab_size: int
    max_position_embeddings: int = 2048
    norm_eps: float = 1e-5
    rope: Rope = Rope()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        assert len(self.kv_groups) == self.num_layers, "one entry of kv_groups per layer"
        assert all(sum(groups) == self.num_attention_heads for groups in self.kv_groups), self.kv_groups
        assert all(size > 0 for groups in self.kv_groups for size in groups), "a KV head without queries must go"

    @property
    def num_query_groups(self) -> int:
        """KV heads of the widest layer (Megatron's name)."""
        return max(len(groups) for groups in self.kv_groups)

    @property
    def uniform_kv(self) -> bool:
        """True when stock GQA can express the model: the same number of queries under every KV head everywhere."""
        return len({size for groups in self.kv_groups for size in groups}) == 1

    def num_kv_heads(self, layer: int) -> int:
        """KV heads of one layer."""
        return len(self.kv_groups[layer])

    def kv_of_head(self, layer: int) -> tuple[int, ...]:
        """For every query head of a layer, the index of the KV head it reads."""
        return tuple(kv for kv, size in enumerate(self.kv_groups[layer]) for _ in range(size))

    def axis_size(self, axis: Axis, layer: int | None = None) -> int:
        """Elements along a tensor dimension of the given axis (``heads`` counts heads * head_dim)."""
        if axis == "kv_heads":
            assert layer is not None
            return self.num_kv_heads(layer) * self.head_dim
        sizes = {
            "stem": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "heads": self.num_attention_heads * self.head_dim,
            "head_dim": self.head_dim,
            "vocab": self.vocab_size,
        }
        return sizes[axis]

    def tensor_shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """Logical shape of a tensor."""
        return tuple(self.axis_size(axis, spec.layer) for axis in spec.axes)

    def num_parameters(self) -> int:
        """Parameters with embeddings, a tied matrix counted once."""
        d, hd, heads = self.hidden_size, self.head_dim, self.num_attention_heads
        total = d + self.vocab_size * d * (1 if self.tie_embeddings else 2)
        for layer in range(self.num_layers):
            kv = self.num_kv_heads(layer)
            total += 2 * d * hd * (heads + kv) + 3 * d * self.ffn_hidden_size + 2 * d
            total += (heads + 2 * kv) * hd * self.qkv_bias + d * self.out_bias
            total += (2 * self.ffn_hidden_size + d) * self.mlp_bias + 2 * hd * self.qk_norm
        return total

    def flops_per_token(self, seq_length: int) -> float:
        """Forward plus backward floating-point operations per token.

        Six per matrix element (two forward, four backward), the output head included and the embedding look-up not,
        plus ``6 * seq_length * heads * head_dim`` a layer for the two causal attention products (half of the full
        square). Recomputation is not counted, as usual for MFU.
        """
        d, hd = self.hidden_size, self.head_dim
        matrices = self.vocab_size * d
        for layer in range(self.num_layers):
            heads_and_kv = self.num_attention_heads + self.num_kv_heads(layer)
            matrices += 2 * d * hd * heads_and_kv + 3 * d * self.ffn_hidden_size
        attention = self.num_layers * seq_length * self.num_attention_heads * hd
        return 6.0 * (matrices + attention)

    def kv_bytes_per_token(self, element_bytes: int = 2) -> int:
        """Bytes of KV cache that one token of context takes, K and V of all layers; 2 bytes an element is bf16."""
        heads = sum(self.num_kv_heads(layer) for layer in range(self.num_layers))
        return 2 * heads * self.head_dim * element_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; :meth:`from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """Inverse of :meth:`to_dict`, also after a trip through JSON (lists become tuples again)."""
        fields = dict(data)
        rope = dict(fields["rope"])
        rope["options"] = tuple((key, _freeze(value)) for key, value in rope["options"])
        fields["rope"] = Rope(**rope)
        fields["kv_groups"] = tuple(tuple(groups) for groups in fields["kv_groups"])
        return cls(**fields)


def uniform_kv_groups(num_layers: int, num_heads: int, num_kv_heads: int) -> tuple[tuple[int, ...], ...]:
    """``kv_groups`` of a stock model: every KV head serves ``num_heads / num_kv_heads`` query heads."""
    assert num_heads % num_kv_heads == 0, (num_heads, num_kv_heads)
    return ((num_heads // num_kv_heads,) * num_kv_heads,) * num_layers


def tensor_specs(arch: Architecture) -> tuple[TensorSpec, ...]:
    """Every parameter of the model in order, a tied head left out."""
    specs = [TensorSpec("model.embed_tokens.weight", ("vocab", "stem"), None)]
    for layer in range(arch.num_layers):
        specs += _layer_specs(arch, layer)
    specs.append(TensorSpec("model.norm.weight", ("stem",), None))
    if not arch.tie_embeddings:
        specs.append(TensorSpec("lm_head.weight", ("vocab", "stem"), None))
    return tuple(specs)


def _layer_specs(arch: Architecture, layer: int) -> list[TensorSpec]:
    def spec(name: str, *axes: Axis) -> TensorSpec:
        return TensorSpec(f"model.layers.{layer}.{name}", axes, layer)

    specs = [spec("input_layernorm.weight", "stem")]
    projections: tuple[tuple[str, Axis, Axis, bool], ...] = (
        ("self_attn.q_proj", "heads", "stem", arch.qkv_bias),
        ("self_attn.k_proj", "kv_heads", "stem", arch.qkv_bias),
        ("self_attn.v_proj", "kv_heads", "stem", arch.qkv_bias),
        ("self_attn.o_proj", "stem", "heads", arch.out_bias),
    )
    mlp: tuple[tuple[str, Axis, Axis, bool], ...] = (
        ("mlp.gate_proj", "ffn", "stem", arch.mlp_bias),
        ("mlp.up_proj", "ffn", "stem", arch.mlp_bias),
        ("mlp.down_proj", "stem", "ffn", arch.mlp_bias),
    )
    for name, out_axis, in_axis, bias in projections:
        specs.append(spec(f"{name}.weight", out_axis, in_axis))
        if bias:
            specs.append(spec(f"{name}.bias", out_axis))
    if arch.qk_norm:
        specs += [spec("self_attn.q_norm.weight", "head_dim"), spec("self_attn.k_norm.weight", "head_dim")]
    specs.append(spec("post_attention_layernorm.weight", "stem"))
    for name, out_axis, in_axis, bias in mlp:
        specs.append(spec(f"{name}.weight", out_axis, in_axis))
        if bias:
            specs.append(spec(f"{name}.bias", out_axis))
    return specs


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value
