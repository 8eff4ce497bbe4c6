"""The estimate before a run: units, steps and tokens per phase, parameters, memory per GPU, GPU-hours.

Pure arithmetic over Architecture and Config. A unit is one output-group channel per block: an FFN channel costs 1, a
head ``head_dim``, a stem channel 2; pruning starts after the warm-up and every unit is followed by its share of
optimizer steps (paper, Eq. 7).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from megatron_prune.architecture import Architecture
from megatron_prune.config import (
    Config,
    ParallelConfig,
    TargetShape,
    parse_ratio,
)
from megatron_prune.memory import GIB, Memory, rank_shard, stage_memory, worst_stage
from megatron_prune.stops import Stop, stops, units_between

_SECONDS_PER_HOUR = 3600


@dataclasses.dataclass(frozen=True)
class Phase:
    """A point on the way down.

    Attributes:
        name: ``source``, the budget of an export (``1.1B``) or ``target``.
        arch: the shape there; only those of ``source`` and of a ledger are certain, see :func:`make_plan`.
        units: units removed until then.
        units_range: fewest and most units any run can need for it.
        parameters_range: of a known shape, with the fewest and the most K/V heads that may remain; None where the run
            finds the shape.
        steps: pruning steps until then, the warm-up left out.
        tokens: tokens until then, the warm-up included; 0 at the source.
        stages: bytes on one GPU of every pipeline stage at that shape.
    """

    name: str
    arch: Architecture
    units: int
    units_range: tuple[int, int]
    parameters_range: tuple[int, int] | None
    steps: int
    tokens: int
    stages: tuple[Memory, ...]

    @property
    def certain(self) -> bool:
        """True when every run needs the same units for it and has the same parameters there."""
        fewest, most = self.units_range
        low, high = self.parameters_range or (0, 1)
        return fewest == most and low == high

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
        calibration: tokens that decide all removals at once (0: learned masks do), or None if they follow the ratio.
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
    calibration: int | None

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
        tokens = (self.warmup_steps + self.steps(units)) * self.batch_tokens + (self.calibration or 0)
        return tokens if units else 0

    def steps(self, units: int) -> int:
        """Optimizer steps after the warm-up until so many units are gone."""
        return pruning_steps(units, self.ratio) if self.calibration is None else 0


def pruning_steps(units: int, ratio: tuple[int, int]) -> int:
    """Optimizer steps in which ``units`` are removed at ``ratio`` = (units, steps), rounded up."""
    pruned, steps = ratio
    return math.ceil(units * steps / pruned)


def make_plan(
    config: Config,
    source: Architecture,
    *,
    num_gpus: int = 1,
    batch_tokens: int | None = None,
    tokens_per_second: float | None = None,
) -> Plan:
    """The estimate of a run.

    With ``--target-shape`` the units are exact, and the parameters too unless it depends on the removals which K/V
    heads remain. A shape that the run will search (the end under ``--target-params``, every export) is stood in for by
    :func:`shape_at_budget`, with the bounds of :func:`units_range`.

    Args:
        config: settings whose pruning part passed ``validate_against_source``.
        source: shape of the source model.
        num_gpus: all processes; tensor times pipeline parallel size must divide them.
        batch_tokens: tokens per optimizer step; default: global batch size x sequence length.
        tokens_per_second: throughput of one GPU, for GPU-hours.

    Raises:
        UserError: the layout does not divide the GPUs, or has more stages than layers.
    """
    calibration = (config.baseline.few_shot_samples or 0) * config.data.seq_length
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
        calibration=calibration if config.baseline.prunes_at_once else None,
    )
    phases = [
        _phase(Stop("source", source, (0, 0), (source.num_parameters(),) * 2), source, config, plan),
        *(_phase(stop, source, config, plan) for stop in stops(config, source)),
    ]
    return dataclasses.replace(plan, phases=tuple(phases))


def _phase(stop: Stop, source: Architecture, config: Config, plan: Plan) -> Phase:
    arch = stop.arch
    units = units_between(source, TargetShape(arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads))
    return Phase(
        name=stop.name,
        arch=arch,
        units=units,
        units_range=stop.units,
        parameters_range=stop.parameters,
        steps=plan.steps(units),
        tokens=plan.tokens_after(units),
        stages=stage_memory(arch, config, plan.num_gpus, source),
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
        "parameters_range": _listed(last.parameters_range),
        "certain": last.certain,
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
        "parameters_range": _listed(phase.parameters_range),
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


def _listed(bounds: tuple[int, int] | None) -> list[int] | None:
    return None if bounds is None else list(bounds)


def format_plan(plan: Plan) -> str:
    """Aligned text for a terminal, without a newline at the end."""
    rows = [("phase", "parameters", "hidden", "ffn", "heads", "units", "tokens", "GPU-hours", "GiB/GPU", "recomputed")]
    for phase in plan.phases:
        arch, about = phase.arch, "" if phase.units_range == (phase.units, phase.units) else "~"
        low, high = phase.parameters_range or (0, 0)
        hours = plan.gpu_hours(phase.tokens)
        rows.append(
            (
                phase.name,
                f"{'' if low == high else '~'}{arch.num_parameters() / 1e6:,.1f} M",
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
    last = plan.phases[-1]
    if len(plan.phases) > 1:
        yield f"pruning: {_pace(plan)}"
    if any(phase.units_range[0] != phase.units_range[1] for phase in plan.phases):
        yield "~ the run decides; here every axis shrinks in proportion. From the cheapest to the dearest way down:"
        for phase in plan.phases[1:]:
            fewest, most = phase.units_range
            low, high = (plan.tokens_after(units) / 1e9 for units in phase.units_range)
            yield f"    {phase.name}: {fewest:,} to {most:,} units, {low:,.2f} to {high:,.2f} B tokens"
    for phase in plan.phases:
        low, high = phase.parameters_range or (0, 0)
        if low < high:
            yield f"~ {phase.name}: {low:,} to {high:,} parameters, as few or many K/V heads keep a query head"
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


def _pace(plan: Plan) -> str:
    steps, tokens = plan.phases[-1].steps, f"of {plan.batch_tokens:,} tokens each"
    if plan.calibration:
        return f"all at once before training, as the gradient of {plan.calibration:,} tokens decides"
    if plan.calibration == 0:
        return f"all at once after {plan.warmup_steps:,} steps of learning masks, {tokens}"
    return f"{plan.warmup_steps:,} warm-up steps, then {steps:,} steps at {'{}:{}'.format(*plan.ratio)}, {tokens}"


def _memory_note(plan: Plan) -> str:
    memory, parallel = plan.phases[0].memory(plan.recompute), plan.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layout = f"TP {tensor} x PP {stages} x DP {parallel.data_parallel_size(plan.num_gpus)}"
    cutting = f"\n    while tensors are cut {memory.compaction / GIB:.1f} in all: two optimizer states, no activations"
    teacher = f", the teacher {memory.teacher / GIB:.1f}" if memory.teacher else ""
    measured = (
        f"\n    a step that prunes collects {memory.statistics / GIB:.1f} more, and then works with "
        f"{memory.solving / GIB:.1f} in place of activations"
        if memory.statistics
        else ""
    )
    reduction = (
        f"\n    when a step's gradients are reduced {memory.reduction / GIB:.1f} in place of activations"
        if memory.reduction > memory.activations_recomputed
        else ""
    )
    return (
        f"memory at the source on {plan.num_gpus} GPU(s) ({layout}), GiB on each of the fullest stage {memory.stage}:\n"
        f"    weights {memory.weights / GIB:.1f}, gradients {memory.gradients / GIB:.1f}, fp32 masters "
        f"{memory.masters / GIB:.1f}, moments {memory.moments / GIB:.1f}, activations {memory.activations / GIB:.1f} "
        f"({memory.activations_recomputed / GIB:.1f} with --recompute; an estimate){teacher}{reduction}{measured}"
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
