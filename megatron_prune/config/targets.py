"""Shapes a run can reach: the floor of its pruning, and the Architecture of any shape in between."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Final, Literal

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.config.schema import PRUNE_AXES, GqaMode, PruneConfig
from megatron_prune.config.values import parse_count, parse_shape
from megatron_prune.errors import UserError

#: Which of the numbers of K/V heads that may remain is meant.
KvHeads = Literal["expected", "fewest", "most"]
KV_BOUNDS: Final[tuple[KvHeads, KvHeads]] = ("fewest", "most")


def reachable_heads(source: Architecture, gqa_mode: GqaMode) -> list[int]:
    """Numbers of query heads that pruning passes through, ascending, the source's own included.

    ``balanced`` takes one query of every K/V head at a time until they have one each, then single K/V heads.
    """
    heads, kv_heads = source.num_attention_heads, source.num_query_groups
    if gqa_mode == "cluster":
        return list(range(1, heads + 1))
    return [*range(1, kv_heads), *range(kv_heads, heads + 1, kv_heads)]


def aligned_heads(source: Architecture, prune: PruneConfig) -> list[int]:
    """Reachable numbers of query heads whose channels are a multiple of ``final_align``, ascending."""
    counts = reachable_heads(source, prune.gqa_mode)
    return [count for count in counts if count * source.head_dim % prune.final_align == 0]


def floor_shape(prune: PruneConfig, source: Architecture) -> tuple[int, int, int]:
    """Least ``(hidden_size, ffn_hidden_size, num_attention_heads)`` that pruning may reach.

    The target shape where there is one; else one head and one quantum (``prune_align``, never above the source) of
    ffn and stem, as multiples of ``final_align``. An axis that ``prune_axes`` leaves out stays at the source's width,
    and so does one that is of no use to ``target_kv_bytes``.

    Raises:
        UserError: the target shape cannot be read, or an axis of the source has no multiple of ``final_align``.
    """
    if prune.target_shape is not None:
        lowest = parse_shape(prune.target_shape).resolve(source)
    else:
        lowest = _aligned_floor(prune, source)
    widths = (source.hidden_size, source.ffn_hidden_size, source.num_attention_heads)
    axes = pruned_axes(prune)
    hidden, ffn, heads = (
        least if axis in axes else width
        for axis, least, width in zip(("stem", "ffn", "attention"), lowest, widths, strict=True)
    )
    return hidden, ffn, heads


def pruned_axes(prune: PruneConfig) -> tuple[str, ...]:
    """The axes that shrink, in the order of ties: of ``--prune-axes`` those that bring the target nearer."""
    useful = PRUNE_AXES if prune.target_kv_bytes is None else ("attention",)
    return tuple(axis for axis in useful if axis in prune.prune_axes)


def heads_within_kv_bytes(prune: PruneConfig, source: Architecture) -> int:
    """Most query heads that ``--target-kv-bytes`` allows, among those that pruning passes through.

    Raises:
        UserError: none does.
    """
    assert prune.target_kv_bytes is not None
    budget = parse_count(prune.target_kv_bytes)
    widths, heads = (source.hidden_size, source.ffn_hidden_size), 1
    for heads in reversed(aligned_heads(source, prune)):
        if shape_between(source, *widths, heads, prune.gqa_mode).kv_bytes_per_token() <= budget:
            return heads
    raise UserError(
        f"--target-kv-bytes {prune.target_kv_bytes} is less than {heads} of the source's heads take, the fewest that a "
        "search may end with: ask for more"
    )


def _aligned_floor(prune: PruneConfig, source: Architecture) -> tuple[int, int, int]:
    """One quantum of stem and ffn and one head, each up to the next multiple (down where the source has no such)."""
    align, axes, quantum = prune.final_align, pruned_axes(prune), max(1, prune.prune_align)
    floors = []
    for axis, key, width in (("stem", "hidden", source.hidden_size), ("ffn", "ffn", source.ffn_hidden_size)):
        if width < align and axis in axes:
            raise UserError(f"--final-align {align} is above the source's {key} {width}: use at most that")
        floors.append(min(-(-min(quantum, width) // align), width // align) * align)
    heads = aligned_heads(source, prune) or [source.num_attention_heads] * ("attention" not in axes)
    if not heads:
        raise UserError(
            f"--final-align {align}: no number of heads of {source.head_dim} channels on the way down from "
            f"{source.num_attention_heads} is a multiple; use a divisor of head_dim {source.head_dim}"
        )
    return floors[0], floors[1], heads[0]


def shape_between(
    source: Architecture,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    gqa_mode: GqaMode = "cluster",
    kv_heads: KvHeads = "expected",
) -> Architecture:
    """The source narrowed to given widths, for counting parameters before the run has decided which heads go.

    Under ``balanced`` the K/V heads follow from the number of heads, which has to be a reachable one.

    Every layer chooses its own heads, and a KV head goes with its last query (paper B.4). How many KV heads remain is
    therefore not known in advance; ``expected`` takes the number expected when the choice is blind to KV heads, spread
    over the layers, ``fewest`` and ``most`` what some choice leaves. The three are one for multi-head attention.
    SmolLM-360M at 5 of 15 heads: 3.7 of 5 KV heads, the paper reports 3.6; 2 at the fewest, 5 at the most.
    """
    heads = num_attention_heads
    if gqa_mode == "balanced":
        return dataclasses.replace(
            source,
            hidden_size=hidden_size,
            ffn_hidden_size=ffn_hidden_size,
            num_attention_heads=heads,
            kv_groups=uniform_kv_groups(source.num_layers, heads, min(heads, source.num_query_groups)),
        )
    left = sum(_kv_heads_left(groups, heads, kv_heads) for groups in source.kv_groups)
    # Rounded at running totals, so that the layers' whole numbers add up to that of all of them.
    marks = [round(left * layer / source.num_layers) for layer in range(source.num_layers + 1)]
    groups = tuple(_even_groups(heads, high - low) for low, high in zip(marks, marks[1:], strict=False))
    return dataclasses.replace(
        source,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=heads,
        kv_groups=groups,
    )


def _kv_heads_left(groups: tuple[int, ...], heads: int, which: KvHeads) -> float:
    """KV heads with a query left when ``heads`` of all queries stay; expected: drawn without regard to KV heads."""
    if which == "most":
        return min(heads, len(groups))
    if which == "fewest":
        full = itertools.accumulate(sorted(groups, reverse=True))
        return 1 + sum(queries < heads for queries in full)
    total = sum(groups)
    draws = math.comb(total, heads)
    return sum(1 - math.comb(total - size, heads) / draws for size in groups)


def _even_groups(heads: int, num_groups: int) -> tuple[int, ...]:
    """Queries shared out over KV heads as evenly as whole numbers allow."""
    least, extra = divmod(heads, num_groups)
    return (least + 1,) * extra + (least,) * (num_groups - extra)
