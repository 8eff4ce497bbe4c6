"""Where a run stops on its way down, and how many units it may take: exports and the target.

A unit is one output-group channel per block: an FFN channel costs 1, a head ``head_dim``, a stem channel 2.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from megatron_prune.architecture import Architecture
from megatron_prune.config import Config, TargetShape, floor_shape, parse_count, shape_between
from megatron_prune.config.schema import GqaMode, PruneConfig
from megatron_prune.config.targets import (
    KV_BOUNDS,
    KvHeads,
    aligned_heads,
    heads_within_kv_bytes,
    pruned_axes,
    reachable_heads,
)
from megatron_prune.pruning.replay import Replay
from megatron_prune.training.targets import make_budget, make_replay

STEM_CHANNEL_UNITS = 2
FFN_CHANNEL_UNITS = 1


@dataclasses.dataclass(frozen=True)
class Stop:
    """An export or the end of the pruning.

    Attributes:
        name: the budget of an export as it was given (``1.1B``), or ``target``.
        arch: the shape there, or a stand-in for the one that the run will find.
        units: fewest and most units that any run can need for it.
        parameters: of ``arch`` with the fewest and with the most K/V heads that may remain; None for a stand-in.
    """

    name: str
    arch: Architecture
    units: tuple[int, int]
    parameters: tuple[int, int] | None


def units_between(source: Architecture, target: TargetShape) -> int:
    """Units from a shape down to another; an axis the target leaves out costs nothing."""
    hidden, ffn, heads = target.resolve(source)
    return (
        STEM_CHANNEL_UNITS * (source.hidden_size - hidden)
        + FFN_CHANNEL_UNITS * (source.ffn_hidden_size - ffn)
        + source.head_dim * (source.num_attention_heads - heads)
    )


def units_range(
    source: Architecture, floor: tuple[int, int, int], budget: int, gqa_mode: GqaMode = "cluster"
) -> tuple[int, int]:
    """Fewest and most units with which a run can first be at or under ``budget`` parameters.

    Every order of removing the three kinds is covered, mixed ones too, and whichever K/V heads go. A run's last shape
    is within the budget and the shape one removal before it was not, so only two FFN widths matter for every head
    count and hidden size: with the fewest K/V heads left the widest within the budget, and with the most the narrowest
    above it.

    Args:
        source: where the run starts.
        floor: least (hidden, ffn, heads).
        budget: parameters, at least those of the floor with the most K/V heads and fewer than the source's.
        gqa_mode: which heads go together.
    """
    hidden = np.arange(floor[0], source.hidden_size + 1)
    heads = np.array([count for count in reachable_heads(source, gqa_mode) if count >= floor[2]])

    def widest(kv_heads: KvHeads) -> npt.NDArray[np.int64]:  # [heads, hidden]
        return np.stack([_widest_ffn(source, int(count), hidden, budget, gqa_mode, kv_heads) for count in heads])

    others = source.head_dim * (source.num_attention_heads - heads)[:, None]
    others = others + STEM_CHANNEL_UNITS * (source.hidden_size - hidden)

    within = np.minimum(widest("fewest"), source.ffn_hidden_size)
    units = others + FFN_CHANNEL_UNITS * (source.ffn_hidden_size - within)
    fewest = units[within >= floor[1]].min()

    fits = widest("most")
    above = np.maximum(fits + 1, floor[1])
    units, exists = others + FFN_CHANNEL_UNITS * (source.ffn_hidden_size - above), above <= source.ffn_hidden_size
    last_steps = (
        (units + FFN_CHANNEL_UNITS)[exists & (above > floor[1])],
        (units + STEM_CHANNEL_UNITS)[:, 1:][exists[:, 1:] & (above[:, 1:] <= fits[:, :-1])],
        (units[1:] + source.head_dim * np.diff(heads)[:, None])[exists[1:] & (above[1:] <= fits[:-1])],
    )
    return int(fewest), max(int(found.max()) for found in last_steps if found.size)


def _widest_ffn(
    source: Architecture, heads: int, hidden: npt.NDArray[np.int64], budget: int, gqa_mode: GqaMode, kv_heads: KvHeads
) -> npt.NDArray[np.int64]:
    """Widest FFN within a budget at every hidden size, below zero where none is, possibly above the source's."""
    constant, per_hidden, per_ffn, per_both = _bilinear(source, heads, gqa_mode, kv_heads)
    return (budget - constant - per_hidden * hidden) // (per_ffn + per_both * hidden)


def _bilinear(source: Architecture, heads: int, gqa_mode: GqaMode, kv_heads: KvHeads) -> tuple[int, int, int, int]:
    """Parameters as ``a + b*hidden + c*ffn + e*hidden*ffn`` at a number of heads, from the Architecture's own count."""

    def count(hidden: int, ffn: int) -> int:
        return shape_between(source, hidden, ffn, heads, gqa_mode, kv_heads).num_parameters()

    constant = count(0, 0)
    per_hidden, per_ffn = count(1, 0) - constant, count(0, 1) - constant
    return constant, per_hidden, per_ffn, count(1, 1) - constant - per_hidden - per_ffn


def shape_at_budget(
    source: Architecture, floor: tuple[int, int, int], budget: int, gqa_mode: GqaMode = "cluster"
) -> Architecture:
    """First shape at or under ``budget`` when every axis shrinks in proportion towards ``floor``.

    A stand-in for the shape that the run will find.
    """
    widths = (source.hidden_size, source.ffn_hidden_size, source.num_attention_heads)
    passed = reachable_heads(source, gqa_mode)
    parts = max(1, sum(width - least for width, least in zip(widths, floor, strict=True)))

    def shape(part: int) -> Architecture:
        steps = (round((width - least) * part / parts) for width, least in zip(widths, floor, strict=True))
        hidden, ffn, heads = (width - step for width, step in zip(widths, steps, strict=True))
        return shape_between(source, hidden, ffn, passed[bisect.bisect_left(passed, heads)], gqa_mode)

    return shape(bisect.bisect_left(range(parts), True, key=lambda part: shape(part).num_parameters() <= budget))


def stops(config: Config, source: Architecture) -> Iterator[Stop]:
    """Every export and the target, from large to small.

    A latency cannot be foretold where nothing has been timed: the target is then the floor, as the most that can go.

    Raises:
        UserError: a ledger to replay cannot be read, does not fit, or does not reach the target or an export.
    """
    prune = config.prune
    if not prune.active:
        return
    replay = make_replay(config, source)
    if replay is not None:
        yield from _replayed(config, source, replay)
        return
    floor, mode = floor_shape(prune, source), prune.gqa_mode
    for mark in sorted(prune.export_budgets, key=parse_count, reverse=True):
        budget = parse_count(mark)
        bounds = units_range(source, floor, budget, mode)
        yield Stop(mark, shape_at_budget(source, floor, budget, mode), bounds, None)
    if prune.target_params is not None:
        budget = parse_count(prune.target_params)
        arch, (fewest, most) = shape_at_budget(source, floor, budget, mode), units_range(source, floor, budget, mode)
        slack, last = _past_the_target(prune, source), shape_between(source, *floor, mode)
        bounds = fewest, min(most + slack, _units_to(last, source))
        yield Stop("target", _aligned(arch, prune, source), bounds, None)
        return
    if prune.target_kv_bytes is not None:
        floor = floor[0], floor[1], heads_within_kv_bytes(prune, source)
    arch = shape_between(source, *floor, mode)
    units = _units_to(arch, source)
    if prune.target_latency_ms is not None:
        yield Stop("target", arch, (1, units), None)
        return
    fewest, most = (shape_between(source, *floor, mode, kv).num_parameters() for kv in KV_BOUNDS)
    yield Stop("target", arch, (units, units), (fewest, most))


def _replayed(config: Config, source: Architecture, replay: Replay) -> Iterator[Stop]:
    """Where a ledger stops, which is certain, but for a latency that has not been measured."""
    prune = config.prune
    ends = {
        mark: replay.first(functools.partial(_within, parse_count(mark)))
        for mark in sorted(prune.export_budgets, key=parse_count, reverse=True)
    }
    ends["target"] = len(replay.events)
    if prune.target_latency_ms is None:
        budget = make_budget(config, source, replay, None)
        assert budget is not None
        ends["target"] = replay.first(budget.met)
    for name, number in ends.items():
        arch = replay.after(number)
        units, parameters = _units_to(arch, source), arch.num_parameters()
        unknown = name == "target" and prune.target_latency_ms is not None
        yield Stop(name, arch, (1 if unknown else units, units), None if unknown else (parameters, parameters))


def _within(most: int, arch: Architecture) -> bool:
    return arch.num_parameters() <= most


def _past_the_target(prune: PruneConfig, source: Architecture) -> int:
    """Most units that ``--final-align`` takes once the target is met."""
    axes, align = pruned_axes(prune), prune.final_align
    aligned = aligned_heads(source, prune)
    gaps = [high - low for low, high in zip(aligned, [*aligned[1:], source.num_attention_heads + 1], strict=True)]
    per_axis = {
        "stem": STEM_CHANNEL_UNITS * (align - 1),
        "ffn": FFN_CHANNEL_UNITS * (align - 1),
        "attention": source.head_dim * (max(gaps, default=1) - 1),
    }
    return sum(per_axis[axis] for axis in axes)


def _aligned(arch: Architecture, prune: PruneConfig, source: Architecture) -> Architecture:
    """A shape with every axis that is pruned at the next multiple below."""
    axes, align = pruned_axes(prune), prune.final_align
    heads = max((count for count in aligned_heads(source, prune) if count <= arch.num_attention_heads), default=1)
    widths = (
        arch.hidden_size // align * align if "stem" in axes else arch.hidden_size,
        arch.ffn_hidden_size // align * align if "ffn" in axes else arch.ffn_hidden_size,
        heads if "attention" in axes else arch.num_attention_heads,
    )
    return shape_between(source, *widths, prune.gqa_mode)


def _units_to(arch: Architecture, source: Architecture) -> int:
    return units_between(source, TargetShape(arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads))
