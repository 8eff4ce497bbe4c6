"""The small languages inside settings: counts (457M), ratios (1:9), shapes (hidden=1195,ffn=3006,heads=19)."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from types import MappingProxyType

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.errors import UserError

_SUFFIXES = MappingProxyType({"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12})
_COUNT = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)([KMBT]?)", re.IGNORECASE)
_RATIO = re.compile(r"(\d+):(\d+)")
_TARGET_KEYS = MappingProxyType({"hidden": "hidden_size", "ffn": "ffn_hidden_size", "heads": "num_attention_heads"})
_SOURCE_KEYS = ("hidden", "ffn", "heads", "kv_heads", "head_dim", "layers", "vocab", "tied", "qkv_bias", "qk_norm")
_SOURCE_REQUIRED = ("hidden", "ffn", "heads", "layers", "vocab")
_SOURCE_SWITCHES = ("tied", "qkv_bias", "qk_norm")


@dataclasses.dataclass(frozen=True)
class TargetShape:
    """Widths to prune down to.

    Attributes:
        hidden_size: stem width, or None to keep the source's.
        ffn_hidden_size: FFN width, or None to keep the source's.
        num_attention_heads: query heads, or None to keep the source's.
    """

    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None

    def resolve(self, source: Architecture) -> tuple[int, int, int]:
        """``(hidden_size, ffn_hidden_size, num_attention_heads)`` with the source's widths filled in."""
        return (
            source.hidden_size if self.hidden_size is None else self.hidden_size,
            source.ffn_hidden_size if self.ffn_hidden_size is None else self.ffn_hidden_size,
            source.num_attention_heads if self.num_attention_heads is None else self.num_attention_heads,
        )


def nearest(word: str, known: Iterable[str]) -> str:
    """``, did you mean X?`` for the known name closest to a misspelt one, or nothing when none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {matches[0]}?" if matches else ""


def parse_count(text: str) -> int:
    """Number of parameters or tokens: digits, decimals allowed, with K, M, B or T (powers of 1000).

    Raises:
        UserError: the text is not such a count, has digits beyond reason, or is below one.
    """
    match = _COUNT.fullmatch(text.strip())
    count = int(Decimal(match[1]) * _SUFFIXES[match[2].upper()]) if match else 0
    if count < 1:
        raise UserError(f"{text!r} is not a count: write digits with an optional K, M, B or T, such as 457M or 1.1B")
    return count


def parse_ratio(text: str) -> tuple[int, int]:
    """Pruned units and optimizer steps of a ratio ``P:G``.

    Raises:
        UserError: not two whole numbers of at least one.
    """
    match = _RATIO.fullmatch(text.strip())
    ratio = (int(match[1]), int(match[2])) if match else (0, 0)
    if min(ratio) < 1:
        raise UserError(f"{text!r} is not a ratio: write units:steps, both whole and at least 1, such as 1:9 or 4:1")
    return ratio


def parse_shape(text: str) -> TargetShape:
    """Target shape from ``hidden=1195,ffn=3006,heads=19``; any of the three may be left out, not all.

    Raises:
        UserError: unknown or repeated key, or a width that is not a whole number of at least one.
    """
    fields = _parse_fields(text, tuple(_TARGET_KEYS), "shape", "hidden=1195,ffn=3006,heads=19")
    _require_positive(fields, text, switches=())
    return TargetShape(**{_TARGET_KEYS[key]: value for key, value in fields.items()})


def parse_source_shape(text: str) -> Architecture:
    """Architecture good enough to plan with, from
    ``hidden=2048,ffn=8192,heads=32,kv_heads=32,head_dim=64,layers=24,vocab=49152,tied=1``.

    ``kv_heads`` defaults to ``heads``, ``head_dim`` to ``hidden / heads``; the switches ``tied``, ``qkv_bias`` (Qwen2)
    and ``qk_norm`` (Qwen3) to 0.

    Raises:
        UserError: unknown, repeated or missing key, a bad value, or heads that do not fit together.
    """
    fields = _parse_fields(text, _SOURCE_KEYS, "source shape", "hidden=2048,ffn=8192,heads=32,layers=24,vocab=49152")
    missing = [key for key in _SOURCE_REQUIRED if key not in fields]
    if missing:
        raise UserError(f"source shape {text!r} lacks {', '.join(missing)}: add {missing[0]}=NUMBER")
    _require_positive(fields, text, switches=_SOURCE_SWITCHES)
    hidden, heads = fields["hidden"], fields["heads"]
    kv_heads = fields.get("kv_heads", heads)
    if heads % kv_heads:
        raise UserError(f"source shape {text!r}: {heads} heads do not divide into {kv_heads} kv_heads")
    if "head_dim" not in fields and hidden % heads:
        raise UserError(f"source shape {text!r}: hidden {hidden} is no multiple of heads {heads}, so give head_dim too")
    if fields.get("head_dim", hidden // heads) % 2:
        raise UserError(f"source shape {text!r}: rotary positions turn channels in pairs, so give an even head_dim")
    return Architecture(
        family="qwen3" if fields.get("qk_norm") else "qwen2" if fields.get("qkv_bias") else "llama",
        num_layers=fields["layers"],
        hidden_size=hidden,
        ffn_hidden_size=fields["ffn"],
        num_attention_heads=heads,
        kv_groups=uniform_kv_groups(fields["layers"], heads, kv_heads),
        head_dim=fields.get("head_dim", hidden // heads),
        vocab_size=fields["vocab"],
        tie_embeddings=bool(fields.get("tied", 0)),
        qkv_bias=bool(fields.get("qkv_bias", 0)),
        qk_norm=bool(fields.get("qk_norm", 0)),
    )


def source_shape_differences(planned: Architecture, actual: Architecture) -> list[str]:
    """Facts in which the shape a plan was made with differs from the source, e.g. ``layers 24, source 30``."""
    return [
        f"{key} {expected}, source {found}"
        for key, expected, found in zip(_SOURCE_KEYS, _source_facts(planned), _source_facts(actual), strict=True)
        if expected != found
    ]


def _source_facts(arch: Architecture) -> tuple[int, ...]:
    """The facts of :data:`_SOURCE_KEYS`, in its order."""
    return (
        arch.hidden_size,
        arch.ffn_hidden_size,
        arch.num_attention_heads,
        arch.num_query_groups,
        arch.head_dim,
        arch.num_layers,
        arch.vocab_size,
        int(arch.tie_embeddings),
        int(arch.qkv_bias),
        int(arch.qk_norm),
    )


def _parse_fields(text: str, known: tuple[str, ...], what: str, example: str) -> dict[str, int]:
    fields: dict[str, int] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not re.fullmatch(r"\d{1,20}", value):
            raise UserError(f"{item.strip()!r} in {what} {text!r} is not KEY=NUMBER: write it like {example}")
        if key not in known:
            raise UserError(
                f"unknown key {key!r} in {what} {text!r}{nearest(key, known) or ': use ' + ', '.join(known)}"
            )
        if key in fields:
            raise UserError(f"{key} is given twice in {what} {text!r}: keep one")
        fields[key] = int(value)
    return fields


def _require_positive(fields: Mapping[str, int], text: str, switches: tuple[str, ...]) -> None:
    for key, value in fields.items():
        if key in switches and value > 1:
            raise UserError(f"{key}={value} in {text!r} is a switch: use 0 or 1")
        if key not in switches and value < 1:
            raise UserError(f"{key}={value} in {text!r} must be at least 1")
