"""Shapes a run can reach: the floor of its pruning, and the Architecture of any shape in between."""

from __future__ import annotations

import dataclasses
import math

from megatron_prune.architecture import Architecture
from megatron_prune.config.schema import PruneConfig
from megatron_prune.config.values import parse_shape


def floor_shape(prune: PruneConfig, source: Architecture) -> tuple[int, int, int]:
    """Least ``(hidden_size, ffn_hidden_size, num_attention_heads)`` that pruning may reach.

    The target shape where there is one; else one head and one quantum (``prune_align``, never above the source) of
    ffn and stem. An axis that ``prune_axes`` leaves out stays at the source's width.

    Raises:
        UserError: the target shape cannot be read.
    """
    if prune.target_shape is not None:
        lowest = parse_shape(prune.target_shape).resolve(source)
    else:
        quantum = max(1, prune.prune_align)
        lowest = (min(quantum, source.hidden_size), min(quantum, source.ffn_hidden_size), 1)
    widths = (source.hidden_size, source.ffn_hidden_size, source.num_attention_heads)
    hidden, ffn, heads = (
        least if axis in prune.prune_axes else width
        for axis, least, width in zip(("stem", "ffn", "attention"), lowest, widths, strict=True)
    )
    return hidden, ffn, heads


def shape_between(
    source: Architecture, hidden_size: int, ffn_hidden_size: int, num_attention_heads: int
) -> Architecture:
    """The source narrowed to given widths, for counting parameters before the run has decided which heads go.

    Every layer chooses its own heads, and a KV head goes with its last query (paper B.4). How many KV heads remain is
    therefore not known in advance; this takes the number expected when the choice is blind to KV heads, spread over
    the layers. Exact for multi-head attention. SmolLM-360M at 5 of 15 heads: 3.7 of 5 KV heads, the paper reports 3.6.
    """
    heads = num_attention_heads
    expected = sum(_expected_kv_heads(groups, heads) for groups in source.kv_groups)
    # Rounded at running totals, so that the layers' whole numbers add up to the expectation of all of them.
    marks = [round(expected * layer / source.num_layers) for layer in range(source.num_layers + 1)]
    groups = tuple(_even_groups(heads, high - low) for low, high in zip(marks, marks[1:], strict=False))
    return dataclasses.replace(
        source,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=heads,
        kv_groups=groups,
    )


def _expected_kv_heads(groups: tuple[int, ...], heads: int) -> float:
    """Expected KV heads with a query left when ``heads`` of all queries stay, drawn without regard to KV heads."""
    total = sum(groups)
    draws = math.comb(total, heads)
    return sum(1 - math.comb(total - size, heads) / draws for size in groups)


def _even_groups(heads: int, num_groups: int) -> tuple[int, ...]:
    """Queries shared out over KV heads as evenly as whole numbers allow."""
    least, extra = divmod(heads, num_groups)
    return (least + 1,) * extra + (least,) * (num_groups - extra)
