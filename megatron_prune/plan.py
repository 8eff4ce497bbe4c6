"""The estimate before a run: units, steps and tokens per phase, parameters, memory per GPU, GPU-hours.

Pure arithmetic over Architecture and Config. A unit is one output-group channel per block: an FFN channel costs 1, a
head ``head_dim``, a stem channel 2; pruning starts after the warm-up and every unit is followed by its share of
optimizer steps (paper, Eq. 7).
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_prune.architecture import Architecture
from megatron_prune.config import (
    Config,
    ParallelConfig,
    TargetShape,
    floor_shape,
    parse_count,
    parse_ratio,
    shape_between,
)
from megatron_prune.memory import GIB, Memory, rank_shard, stage_memory, worst_stage

STEM_CHANNEL_UNITS = 2
FFN_CHANNEL_UNITS = 1

_SECONDS_PER_HOUR = 3600


@dataclasses.dataclass(frozen=True)
class Phase:
    """A point on the way down.

    Attributes:
        name: ``source``, the budget of an export (``1.1B``) or ``target``.
        arch: the shape there; only ``source`` and a target shape are certain, see :func:`make_plan`.
        units: units removed until then.
        units_range: fewest and most units any run can need for it.
        steps: pruning steps until then, the warm-up left out.
        tokens: tokens until then, the warm-up included; 0 at the source.
        stages: bytes on one GPU of every pipeline stage at that shape.
    """

    name: str
    arch: Architecture
    units: int
    units_range: tuple[int, int]
    steps: int
    tokens: int
    stages: tuple[Memory, ...]

    def memory(self, recompute: bool) -> Memory:
        """The stage that holds most in training."""
        return worst_stage(self.stages, recompute)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The whole estimate; :func:`plan_dict` makes it JSON-ready.

    Attributes:
        phases: source, exports on the way, target; the source alone without pruning.
        ratio: pruned units and optimizer steps.
        warmup_steps: steps before pruning starts.
        batch_tokens: tokens per optimizer step.
        train_iters: steps of the run as configured; 0 when not given.
        num_gpus: all processes.
        parallel: how they share the model.
        recompute: as configured.
        tokens_per_second: assumed throughput of one GPU, or None.
    """

    phases: tuple[Phase, ...]
    ratio: tuple[int, int]
    warmup_steps: int
    batch_tokens: int
    train_iters: int
    num_gpus: int
    parallel: ParallelConfig
    recompute: bool
    tokens_per_second: float | None

    @property
    def continue_steps(self) -> int:
        """Steps of the run left for the second stage (all of them when nothing is pruned)."""
        used = self.warmup_steps + self.phases[-1].steps if len(self.phases) > 1 else 0
        return max(0, self.train_iters - used)

    def gpu_hours(self, tokens: int) -> float | None:
        """GPU-hours for so many tokens at the assumed throughput."""
        if self.tokens_per_second is None:
            return None
        return tokens / self.tokens_per_second / _SECONDS_PER_HOUR

    def tokens_after(self, units: int) -> int:
        """Tokens, warm-up included, until so many units are gone; none before anything is."""
        return (self.warmup_steps + pruning_steps(units, self.ratio)) * self.batch_tokens if units else 0


def units_between(source: Architecture, target: TargetShape) -> int:
    """Units from a shape down to another; an axis the target leaves out costs nothing."""
    hidden, ffn, heads = target.resolve(source)
    return (
        STEM_CHANNEL_UNITS * (source.hidden_size - hidden)
        + FFN_CHANNEL_UNITS * (source.ffn_hidden_size - ffn)
        + source.head_dim * (source.num_attention_heads - heads)
    )


def pruning_steps(units: int, ratio: tuple[int, int]) -> int:
    """Optimizer steps in which ``units`` are removed at ``ratio`` = (units, steps), rounded up."""
    pruned, steps = ratio
    return math.ceil(units * steps / pruned)


def units_range(source: Architecture, floor: tuple[int, int, int], budget: int) -> tuple[int, int]:
    """Fewest and most units with which a run can first be at or under ``budget`` parameters.

    Every order of removing the three kinds is covered, mixed ones too. A run's last shape is within the budget and
    the shape one removal before it was not, so only two FFN widths matter for every head count and hidden size: the
    widest within the budget and the narrowest above it.

    Args:
        source: where the run starts.
        floor: least (hidden, ffn, heads).
        budget: parameters, at least those of the floor and fewer than the source's.
    """
    hidden = np.arange(floor[0], source.hidden_size + 1)
    heads = np.arange(floor[2], source.num_attention_heads + 1)
    fits = np.stack([_widest_ffn(source, int(count), hidden, budget) for count in heads])  # [heads, hidden]
    others = source.head_dim * (source.num_attention_heads - heads)[:, None]
    others = others + STEM_CHANNEL_UNITS * (source.hidden_size - hidden)

    within = np.minimum(fits, source.ffn_hidden_size)
    units = others + FFN_CHANNEL_UNITS * (source.ffn_hidden_size - within)
    fewest = units[within >= floor[1]].min()

    above = np.maximum(fits + 1, floor[1])
    units, exists = others + FFN_CHANNEL_UNITS * (source.ffn_hidden_size - above), above <= source.ffn_hidden_size
    last_steps = (
        (units + FFN_CHANNEL_UNITS)[exists & (above > floor[1])],
        (units + STEM_CHANNEL_UNITS)[:, 1:][exists[:, 1:] & (above[:, 1:] <= fits[:, :-1])],
        (units + source.head_dim)[1:][exists[1:] & (above[1:] <= fits[:-1])],
    )
    return int(fewest), max(int(found.max()) for found in last_steps if found.size)


def _widest_ffn(source: Architecture, heads: int, hidden: npt.NDArray[np.int64], budget: int) -> npt.NDArray[np.int64]:
    """Widest FFN within a budget at every hidden size, below zero where none is, possibly above the source's."""
    constant, per_hidden, per_ffn, per_both = _bilinear(source, heads)
    return (budget - constant - per_hidden * hidden) // (per_ffn + per_both * hidden)


def _bilinear(source: Architecture, heads: int) -> tuple[int, int, int, int]:
    """Parameters as ``a + b*hidden + c*ffn + e*hidden*ffn`` at a number of heads, from the Architecture's own count."""

    def count(hidden: int, ffn: int) -> int:
        return shape_between(source, hidden, ffn, heads).num_parameters()

    constant = count(0, 0)
    per_hidden, per_ffn = count(1, 0) - constant, count(0, 1) - constant
    return constant, per_hidden, per_ffn, count(1, 1) - constant - per_hidden - per_ffn


def shape_at_budget(source: Architecture, floor: tuple[int, int, int], budget: int) -> Architecture:
    """First shape at or under ``budget`` when every axis shrinks in proportion towards ``floor``.

    A stand-in for the shape that the run will find.
    """
    widths = (source.hidden_size, source.ffn_hidden_size, source.num_attention_heads)
    parts = max(1, sum(width - least for width, least in zip(widths, floor, strict=True)))

    def shape(part: int) -> Architecture:
        steps = (round((width - least) * part / parts) for width, least in zip(widths, floor, strict=True))
        hidden, ffn, heads = (width - step for width, step in zip(widths, steps, strict=True))
        return shape_between(source, hidden, ffn, heads)

    return shape(bisect.bisect_left(range(parts), True, key=lambda part: shape(part).num_parameters() <= budget))


def make_plan(
    config: Config,
    source: Architecture,
    *,
    num_gpus: int = 1,
    batch_tokens: int | None = None,
    tokens_per_second: float | None = None,
) -> Plan:
    """The estimate of a run.

    With ``--target-shape`` the end is exact. A shape that the run will search (the end under ``--target-params``,
    every export) is stood in for by :func:`shape_at_budget`, with the bounds of :func:`units_range`.

    Args:
        config: settings whose pruning part passed ``validate_against_source``.
        source: shape of the source model.
        num_gpus: all processes; tensor times pipeline parallel size must divide them.
        batch_tokens: tokens per optimizer step; default: global batch size x sequence length.
        tokens_per_second: throughput of one GPU, for GPU-hours.

    Raises:
        UserError: the layout does not divide the GPUs, or has more stages than layers.
    """
    plan = Plan(
        phases=(),
        ratio=parse_ratio(config.prune.prune_ratio),
        warmup_steps=config.prune_start_iter,
        batch_tokens=config.batch_tokens if batch_tokens is None else batch_tokens,
        train_iters=config.train.train_iters,
        num_gpus=num_gpus,
        parallel=config.parallel,
        recompute=config.train.recompute,
        tokens_per_second=tokens_per_second,
    )
    phases = [
        _phase("source", source, (0, 0), source, config, plan),
        *(_phase(name, arch, bounds, source, config, plan) for name, arch, bounds in _stops(config, source)),
    ]
    return dataclasses.replace(plan, phases=tuple(phases))


def _stops(config: Config, source: Architecture) -> Iterator[tuple[str, Architecture, tuple[int, int]]]:
    """Name, shape and bounds on the units of every export and of the target, from large to small."""
    prune = config.prune
    if not prune.active:
        return
    floor = floor_shape(prune, source)
    searched = [(mark, parse_count(mark)) for mark in sorted(prune.export_at, key=parse_count, reverse=True)]
    if prune.target_params is not None:
        searched.append(("target", parse_count(prune.target_params)))
    for name, budget in searched:
        yield name, shape_at_budget(source, floor, budget), units_range(source, floor, budget)
    if prune.target_params is None:
        arch = shape_between(source, *floor)
        units = units_between(source, TargetShape(*floor))
        yield "target", arch, (units, units)


def _phase(
    name: str, arch: Architecture, bounds: tuple[int, int], source: Architecture, config: Config, plan: Plan
) -> Phase:
    units = units_between(source, TargetShape(arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads))
    return Phase(
        name=name,
        arch=arch,
        units=units,
        units_range=bounds,
        steps=pruning_steps(units, plan.ratio),
        tokens=plan.tokens_after(units),
        stages=stage_memory(arch, config, plan.num_gpus),
    )


def plan_dict(plan: Plan) -> dict[str, Any]:
    """JSON-ready form. ``steps`` are the pruning steps; ``tokens`` count the warm-up too; memory is in bytes."""
    last = plan.phases[-1]
    return {
        "units": last.units,
        "steps": last.steps,
        "tokens": last.tokens,
        "parameters_source": plan.phases[0].arch.num_parameters(),
        "parameters_target": last.arch.num_parameters(),
        "certain": last.units_range == (last.units, last.units),
        "units_range": list(last.units_range),
        "tokens_range": [plan.tokens_after(units) for units in last.units_range],
        "warmup_steps": plan.warmup_steps,
        "batch_tokens": plan.batch_tokens,
        "continue_steps": plan.continue_steps,
        "continue_tokens": plan.continue_steps * plan.batch_tokens,
        "gpu_hours": plan.gpu_hours(last.tokens),
        "continue_gpu_hours": plan.gpu_hours(plan.continue_steps * plan.batch_tokens),
        "phases": [_phase_dict(phase, plan) for phase in plan.phases],
    }


def _phase_dict(phase: Phase, plan: Plan) -> dict[str, Any]:
    arch, memory = phase.arch, phase.memory(plan.recompute)
    return {
        "name": phase.name,
        "parameters": arch.num_parameters(),
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "units": phase.units,
        "units_range": list(phase.units_range),
        "steps": phase.steps,
        "tokens": phase.tokens,
        "gpu_hours": plan.gpu_hours(phase.tokens),
        "memory": dataclasses.asdict(memory) | {"total": memory.total(plan.recompute)},
    }


def format_plan(plan: Plan) -> str:
    """Aligned text for a terminal, without a newline at the end."""
    rows = [("phase", "parameters", "hidden", "ffn", "heads", "units", "tokens", "GPU-hours", "GiB/GPU", "recomputed")]
    for phase in plan.phases:
        arch, about = phase.arch, "" if phase.units_range == (phase.units, phase.units) else "~"
        hours = plan.gpu_hours(phase.tokens)
        rows.append(
            (
                phase.name,
                f"{arch.num_parameters() / 1e6:,.1f} M",
                f"{about}{arch.hidden_size}",
                f"{about}{arch.ffn_hidden_size}",
                f"{about}{arch.num_attention_heads}",
                f"{about}{phase.units:,}",
                f"{about}{phase.tokens / 1e9:,.2f} B",
                "-" if hours is None else f"{about}{hours:,.0f}",
                f"{phase.memory(recompute=False).total(recompute=False) / GIB:,.1f}",
                f"{phase.memory(recompute=True).total(recompute=True) / GIB:,.1f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    table = ["  ".join([cells[0].strip().ljust(widths[0]), *cells[1:]]) for cells in padded]
    return "\n".join([*table, "", *_notes(plan)])


def _notes(plan: Plan) -> Iterator[str]:
    last, ratio = plan.phases[-1], "{}:{}".format(*plan.ratio)
    if len(plan.phases) > 1:
        steps = f"{plan.warmup_steps:,} warm-up steps, then {last.steps:,} steps at {ratio}"
        yield f"pruning: {steps}, of {plan.batch_tokens:,} tokens each"
    if any(phase.units_range[0] != phase.units_range[1] for phase in plan.phases):
        yield "~ the run decides; here every axis shrinks in proportion. From the cheapest to the dearest way down:"
        for phase in plan.phases[1:]:
            fewest, most = phase.units_range
            low, high = (plan.tokens_after(units) / 1e9 for units in phase.units_range)
            yield f"    {phase.name}: {fewest:,} to {most:,} units, {low:,.2f} to {high:,.2f} B tokens"
    if plan.continue_steps:
        tokens = plan.continue_steps * plan.batch_tokens
        hours = plan.gpu_hours(tokens)
        cost = "" if hours is None else f", {hours:,.0f} GPU-hours"
        yield f"continued pretraining: {plan.continue_steps:,} steps, {tokens / 1e9:,.2f} B tokens{cost}"
    elif 0 < plan.train_iters < plan.warmup_steps + last.steps:
        yield f"note: --train-iters {plan.train_iters:,} may end before the target is met"
    yield _memory_note(plan)
    if plan.parallel.tensor_model_parallel_size > 1:
        yield _shard_note(plan)


def _memory_note(plan: Plan) -> str:
    memory, parallel = plan.phases[0].memory(plan.recompute), plan.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layout = f"TP {tensor} x PP {stages} x DP {parallel.data_parallel_size(plan.num_gpus)}"
    cutting = f"\n    while tensors are cut {memory.compaction / GIB:.1f} in all: two optimizer states, no activations"
    reduction = (
        f"\n    when a step's gradients are reduced {memory.reduction / GIB:.1f} in place of activations"
        if memory.reduction > memory.activations_recomputed
        else ""
    )
    return (
        f"memory at the source on {plan.num_gpus} GPU(s) ({layout}), GiB on each of the fullest stage {memory.stage}:\n"
        f"    weights {memory.weights / GIB:.1f}, gradients {memory.gradients / GIB:.1f}, fp32 masters "
        f"{memory.masters / GIB:.1f}, moments {memory.moments / GIB:.1f}, activations {memory.activations / GIB:.1f} "
        f"({memory.activations_recomputed / GIB:.1f} with --recompute; an estimate){reduction}"
        f"{cutting if len(plan.phases) > 1 else ''}"
    )


def _shard_note(plan: Plan) -> str:
    """What a tensor parallel rank holds, and what of it is there because a number does not divide."""
    arch, ranks = plan.phases[0].arch, plan.parallel.tensor_model_parallel_size
    shard = rank_shard(arch, ranks)
    held = {
        "heads": (shard.num_attention_heads, arch.num_attention_heads),
        "KV heads": (shard.num_query_groups, arch.num_query_groups),
        "FFN channels": (shard.ffn_hidden_size, arch.ffn_hidden_size),
        "vocabulary rows": (shard.vocab_size, arch.vocab_size),
    }
    parts = ", ".join(f"{places:,} {name} ({ranks * places:,} for {units:,})" for name, (places, units) in held.items())
    extra = 1 - arch.num_parameters() / (ranks * shard.num_parameters())
    return (
        f"each of {ranks} tensor parallel ranks has\n    {parts};\n    {extra:.1%} of the weights are padding or copies"
    )
