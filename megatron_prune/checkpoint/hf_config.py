"""Hugging Face ``config.json`` to :class:`Architecture` and back, as pure functions on dictionaries.

Import accepts what transformers 4 wrote (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and what 5 writes
(``rope_parameters``, ``dtype``). Export writes the older spelling, which both read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from megatron_prune.architecture import Architecture, Family, Rope, uniform_kv_groups
from megatron_prune.errors import UserError
from megatron_prune.model.rope import check_rope

_COMMON_DEFAULTS: Final[Mapping[str, Any]] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "rope_theta": 10000.0,
}
_QWEN_DEFAULTS: Final[Mapping[str, Any]] = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
#: What a key means when config.json leaves it out: the default of the family's transformers config class.
DEFAULTS: Final[Mapping[Family, Mapping[str, Any]]] = {
    "llama": {
        **_COMMON_DEFAULTS,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        **_COMMON_DEFAULTS,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {**_COMMON_DEFAULTS, **_QWEN_DEFAULTS},
    "qwen3": {**_COMMON_DEFAULTS, **_QWEN_DEFAULTS, "head_dim": 128},
}
#: Keys of a source's config.json that say nothing of its shape and travel to the export.
CARRIED_KEYS: Final = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache")
TOKEN_ID_KEYS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
#: transformers class of every model_type an export can have.
HF_CLASSES: Final[Mapping[str, str]] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
}


def architecture_from_hf(config: Mapping[str, Any]) -> Architecture:
    """Read the content of a ``config.json``.

    Args:
        config: the parsed JSON object.

    Returns:
        The architecture, with uniform K/V groups.

    Raises:
        UserError: a family, activation, rope type, quantization or layer pattern that is not supported, or sizes
            that are no positive integers or do not fit together.
    """
    family = _family(config)
    values = {**DEFAULTS[family], **config}
    _refuse_unsupported(values)
    layers = _positive_int(values, "num_hidden_layers")
    hidden = _positive_int(values, "hidden_size")
    heads = _positive_int(values, "num_attention_heads")
    kv_heads = heads if values["num_key_value_heads"] is None else _positive_int(values, "num_key_value_heads")
    if heads % kv_heads:
        raise UserError(
            f"config.json: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}; "
            "stock grouped-query attention needs one"
        )
    context = _positive_int(values, "max_position_embeddings")
    attention_bias = bool(values["attention_bias"]) and family in ("llama", "qwen3")
    return Architecture(
        family=family,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=_positive_int(values, "intermediate_size"),
        num_attention_heads=heads,
        kv_groups=uniform_kv_groups(layers, heads, kv_heads),
        head_dim=_head_dim(values, hidden, heads),
        vocab_size=_positive_int(values, "vocab_size"),
        max_position_embeddings=context,
        norm_eps=_positive_number(values, "rms_norm_eps"),
        rope=_rope(values, context),
        tie_embeddings=bool(values["tie_word_embeddings"]),
        qkv_bias=attention_bias or family == "qwen2",
        out_bias=attention_bias,
        mlp_bias=bool(values["mlp_bias"]) and family == "llama",
        qk_norm=family == "qwen3",
        sliding_window=_sliding_window(family, values, layers),
    )


def export_model_type(arch: Architecture) -> str:
    """The stock transformers family that holds exactly these tensors.

    Llama's config class refuses a hidden size that the heads don't divide. Mistral has the same tensors and an
    explicit head_dim; it has no biases, and where they are needed Seed-OSS (transformers 4.56 and later) is the
    same decoder with every bias a switch.
    """
    if arch.family != "llama" or arch.hidden_size % arch.num_attention_heads == 0:
        return arch.family
    return "seed_oss" if arch.qkv_bias or arch.out_bias or arch.mlp_bias else "mistral"


def hf_config_from_architecture(arch: Architecture, *, torch_dtype: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Content of a ``config.json`` that stock transformers loads without remote code.

    Args:
        arch: what the model is. K/V heads in groups of different size are counted once per query head, the way
            :func:`megatron_prune.checkpoint.hf.export_hf` writes them.
        torch_dtype: of the stored weights, e.g. ``bfloat16``.
        extra: the source's ``config.json`` (or any part); the keys of ``CARRIED_KEYS`` are taken over.

    Returns:
        JSON-ready dictionary.
    """
    model_type = export_model_type(arch)
    carried = {key: extra[key] for key in CARRIED_KEYS if key in extra}
    config: dict[str, Any] = {
        "architectures": [HF_CLASSES[model_type]],
        "model_type": model_type,
        # Explicit: a family's own defaults (1 and 2 for Llama) may be nonsense in this vocabulary.
        **{key: _default_token_id(arch.family, key) if extra else None for key in TOKEN_ID_KEYS},
        **carried,
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups if arch.uniform_kv else arch.num_attention_heads,
        "head_dim": arch.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": arch.max_position_embeddings,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tie_embeddings,
        "rope_theta": arch.rope.theta,
        "rope_scaling": _rope_scaling(arch.rope),
        "torch_dtype": torch_dtype,
        **_family_keys(arch, model_type),
    }
    return config


def _family_keys(arch: Architecture, model_type: str) -> dict[str, Any]:
    """What only one family's config class knows. Asserts catch an architecture no import can produce."""
    if model_type == "mistral":
        assert not any((arch.qkv_bias, arch.out_bias, arch.mlp_bias, arch.qk_norm)), arch
        return {"sliding_window": arch.sliding_window}
    if model_type in ("qwen2", "qwen3"):
        window = arch.sliding_window
        keys: dict[str, Any] = {"use_sliding_window": window is not None, "sliding_window": window}
        if window is not None:
            keys["max_window_layers"] = 0  # the first layer with a window
        if model_type == "qwen3":
            assert arch.qk_norm, arch
            assert arch.qkv_bias == arch.out_bias, arch
            return keys | {"attention_bias": arch.qkv_bias}
        assert arch.qkv_bias, arch
        assert not any((arch.out_bias, arch.mlp_bias, arch.qk_norm)), arch
        return keys
    assert arch.sliding_window is None, arch
    assert not arch.qk_norm, arch
    biases = {"attention_bias": arch.qkv_bias, "mlp_bias": arch.mlp_bias}
    if model_type == "seed_oss":
        return biases | {"attention_out_bias": arch.out_bias, "attention_dropout": 0.0, "residual_dropout": 0.0}
    assert arch.qkv_bias == arch.out_bias, arch
    return biases


def _default_token_id(family: Family, key: str) -> int | None:
    """The id a source config of this family means by leaving the key out."""
    defaults = {"bos_token_id": 1, "eos_token_id": 2} if family in ("llama", "mistral") else {}
    return defaults.get(key)


def _family(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    for family in DEFAULTS:
        if model_type == family:
            return family
    supported = ", ".join(DEFAULTS)
    raise UserError(f"config.json: model_type {model_type!r} is not supported (supported: {supported})")


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    if values["hidden_act"] not in ("silu", "swish"):
        raise UserError(f"config.json: hidden_act '{values['hidden_act']}' is not supported (supported: silu)")
    if values.get("quantization_config"):
        raise UserError("config.json: the source is quantized (quantization_config); give the full-precision model")
    rope = _rope_dict(values)
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise UserError(f"config.json: partial_rotary_factor {partial} is not supported (supported: 1)")


def _positive_int(values: Mapping[str, Any], key: str) -> int:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UserError(f"config.json: {key} must be a positive integer, not {value!r}")
    return value


def _positive_number(values: Mapping[str, Any], key: str) -> float:
    value = values[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        raise UserError(f"config.json: {key} must be a positive number, not {value!r}")
    return float(value)


def _head_dim(values: Mapping[str, Any], hidden: int, heads: int) -> int:
    if values["head_dim"] is not None:
        head_dim = _positive_int(values, "head_dim")
    elif hidden % heads == 0:
        head_dim = hidden // heads
    else:
        raise UserError(
            f"config.json: hidden_size={hidden} is no multiple of num_attention_heads={heads} and there is "
            "no head_dim; add head_dim"
        )
    if head_dim % 2:
        raise UserError(f"config.json: head_dim {head_dim} is odd; rotary embedding needs pairs")
    return head_dim


def _rope_dict(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rope settings wherever this version of transformers put them; empty when there are none."""
    for key in ("rope_scaling", "rope_parameters"):
        value = values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise UserError(f"config.json: {key} must be an object, not {value!r}")
        if value:
            if any(isinstance(item, Mapping) for item in value.values()):
                raise UserError(f"config.json: {key} differs between layer types, which is not supported")
            return value
    return {}


def _rope(values: Mapping[str, Any], context: int) -> Rope:
    given = dict(_rope_dict(values))
    legacy_kind = given.pop("type", None)
    kind = str(given.pop("rope_type", None) or legacy_kind or "default")
    theta = _positive_number({"rope_theta": given.pop("rope_theta", None) or values["rope_theta"]}, "rope_theta")
    given.pop("partial_rotary_factor", None)
    if kind in ("llama3", "yarn"):
        original = values.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
        given["original_max_position_embeddings"] = original or context
        if kind == "yarn" and given.get("factor") is None:
            given["factor"] = context / given["original_max_position_embeddings"]
    options = () if kind == "default" else tuple(sorted((k, v) for k, v in given.items() if v is not None))
    rope = Rope(theta=theta, kind=kind, options=options)
    check_rope(rope)
    return rope


def _rope_scaling(rope: Rope) -> dict[str, Any] | None:
    return None if rope.kind == "default" else {"rope_type": rope.kind, **dict(rope.options)}


def _sliding_window(family: Family, values: Mapping[str, Any], layers: int) -> int | None:
    """The window when all layers have it, None when none has."""
    if family == "llama":
        return None
    if family == "mistral":
        return None if values["sliding_window"] is None else _positive_int(values, "sliding_window")
    window = values["sliding_window"] if values["use_sliding_window"] else None
    first = values["max_window_layers"]
    types = values.get("layer_types") or [
        "sliding_attention" if window is not None and layer >= first else "full_attention" for layer in range(layers)
    ]
    if set(types) == {"full_attention"}:
        return None
    if set(types) != {"sliding_attention"}:
        kinds = ", ".join(sorted(set(types)))
        raise UserError(f"config.json: layers of different kinds ({kinds}) are not supported; all must be of one kind")
    if window is None:
        raise UserError(
            "config.json: layer_types says sliding_attention, but there is no window; set use_sliding_window"
        )
    return _positive_int(values, "sliding_window")
