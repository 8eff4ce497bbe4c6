"""From the settings to when pruning stops and what it repeats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_prune.architecture import Architecture
from megatron_prune.config import Config, floor_shape, parse_count, parse_shape
from megatron_prune.config.schema import PruneConfig, PruneCost
from megatron_prune.config.targets import pruned_axes
from megatron_prune.errors import UserError
from megatron_prune.pruning.cost import Costs, LatencyTable
from megatron_prune.pruning.groups import GROUP_TYPES, GroupType
from megatron_prune.pruning.planner import Budget
from megatron_prune.pruning.replay import Replay, read_replay


def make_replay(config: Config, source: Architecture) -> Replay | None:
    """The ledger to repeat, or None.

    Raises:
        UserError: it cannot be read, does not fit the source, or ends before the target or an export.
    """
    prune = config.prune
    if prune.replay is None:
        return None
    replay = read_replay(Path(prune.replay), source, prune.order)
    if not prune.needs_latency:  # else once that has been measured
        make_budget(config, source, replay, None)
    return replay


def make_budget(
    config: Config, source: Architecture, replay: Replay | None, measure: Callable[[], LatencyTable] | None
) -> Budget | None:
    """What ends the pruning, or None without pruning.

    Args:
        config: checked settings.
        source: the model that is pruned.
        replay: the ledger to repeat, if any.
        measure: the table of latencies, asked for if it is needed; None where it is not.

    Raises:
        UserError: the latency asked for is not between the source's and the floor's, or the ledger ends before the
            target or an export.
    """
    prune = config.prune
    if not prune.active:
        return None
    hidden, ffn, heads = floor_shape(prune, source)
    floors: dict[GroupType, int] = {"attention": heads, "ffn": ffn, "stem": hidden}
    shape: dict[GroupType, int] | None = None
    if prune.target_shape is not None:
        goal = parse_shape(prune.target_shape).resolve(source)
        shape = {"stem": goal[0], "ffn": goal[1], "attention": goal[2]}
    assert measure is not None or not prune.needs_latency
    costs = Costs(config.data.seq_length, measure() if measure is not None and prune.needs_latency else None)
    axes = pruned_axes(prune)
    if prune.target_latency_ms is not None:
        assert costs.latency is not None
        _check_latency(prune.target_latency_ms, costs.latency, source, (hidden, ffn, heads))
    budget = Budget(
        target_params=None if prune.target_params is None else parse_count(prune.target_params),
        target_shape=shape,
        floors=floors,
        axes=[kind for kind in GROUP_TYPES if kind in axes],
        limit=_limit(prune),
        costs=costs,
        gqa_mode=prune.gqa_mode,
        align=prune.final_align,
        order=None if prune.order is None else [kind for kind in prune.order if kind in GROUP_TYPES],
        last_shape=None if replay is None else replay.end(),
    )
    if replay is not None:
        _check_reach(prune, replay, budget)
    return budget


def _check_reach(prune: PruneConfig, replay: Replay, budget: Budget) -> None:
    """Refuse a target that the ledger does not reach, and exports that the run does not."""
    last = replay.after(len(replay.events))
    shape = f"hidden={last.hidden_size},ffn={last.ffn_hidden_size},heads={last.num_attention_heads}"
    ledger = f"beyond --replay {prune.replay}, which ends at {last.num_parameters():,} parameters ({shape})"
    for flag, value in prune.targets.items():
        if not budget.reached(last):
            raise UserError(f"{flag} {value} is {ledger}: ask for more, or drop it to end with the ledger")
    end = replay.after(replay.first(budget.met)).num_parameters()
    for mark in prune.export_budgets:
        if parse_count(mark) < last.num_parameters():
            raise UserError(f"--export-at {mark} is {ledger}: ask for more, or drop it")
        if parse_count(mark) < end:
            raise UserError(f"--export-at {mark} is below the {end:,} parameters at which the target ends the run")


def _limit(prune: PruneConfig) -> tuple[PruneCost, float] | None:
    if prune.target_latency_ms is not None:
        return "latency", prune.target_latency_ms
    if prune.target_kv_bytes is not None:
        return "kv-bytes", parse_count(prune.target_kv_bytes)
    return None


def _check_latency(asked: float, table: LatencyTable, source: Architecture, floor: tuple[int, int, int]) -> None:
    widths = source.hidden_size, source.ffn_hidden_size, source.num_attention_heads
    most, least = table.milliseconds_of(*widths), table.milliseconds_of(*floor)
    if not least <= asked < most:
        shape = "hidden={},ffn={},heads={}".format(*floor)
        raise UserError(
            f"--target-latency-ms {asked:g} is not between the {least:.3g} ms a token measured for the floor {shape} "
            f"and the {most:.3g} ms of the source: ask for something between"
        )
