"""All rules about settings, checked before any process group or model exists and reported together."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from megatron_prune.architecture import Architecture
from megatron_prune.config.schema import PRUNE_AXES, Config
from megatron_prune.config.targets import floor_shape, heads_within_kv_bytes, shape_between
from megatron_prune.config.validate_baseline import baseline_problems
from megatron_prune.config.validate_search import search_problems, search_problems_of
from megatron_prune.config.values import (
    nearest,
    parse_count,
    parse_ratio,
    parse_shape,
    parse_source_shape,
    source_shape_differences,
)
from megatron_prune.errors import ConfigError, UserError

_Value = TypeVar("_Value")
_MAX_SEED = 2**63  # generators take 64 bits
_MIN_CHECKPOINTS = 2  # with one, a crash while the next is written could leave none


def validate_config(config: Config, world_size: int) -> None:
    """Checks what can be known from the settings alone.

    Args:
        config: the settings.
        world_size: processes of the job.

    Raises:
        ConfigError: with every problem found.
    """
    problems = [
        *_missing(config),
        *setting_problems(config, world_size),
        *(_layout(config, world_size) or _batch(config, config.parallel.data_parallel_size(world_size))),
    ]
    if problems:
        raise ConfigError(problems)


def setting_problems(config: Config, world_size: int) -> list[str]:
    """What a run refuses and a plan too, one line each: all but what is missing, and a layout that does not divide.

    Args:
        config: the settings.
        world_size: processes of the job.
    """
    return [
        *_instructions(config),
        *_numbers(config),
        *_schedule(config),
        *_split(config),
        *_pruning(config),
        *_syntax(config),
        *_metric(config),
        *baseline_problems(config, world_size),
    ]


def validate_against_source(config: Config, arch: Architecture) -> None:
    """Checks the settings against the model they start from.

    Args:
        config: settings that passed :func:`validate_config`.
        arch: the source's shape.

    Raises:
        ConfigError: with every problem found.
    """
    problems = []
    window = arch.sliding_window
    if window is not None and config.data.seq_length > window:
        problems.append(
            f"--seq-length {config.data.seq_length} is longer than the source's attention window of {window}: "
            f"use at most {window}"
        )
    if config.model.source_shape is not None:
        differences = source_shape_differences(parse_source_shape(config.model.source_shape), arch)
        if differences:
            problems.append(f"--source-shape is not the source's shape ({'; '.join(differences)}): correct or drop it")
    stages = config.parallel.pipeline_model_parallel_size
    if stages > arch.num_layers:
        problems.append(
            f"--pipeline-model-parallel-size {stages} is above the source's {arch.num_layers} layers: use at most that"
        )
    problems += _target_shape(config, arch) if config.prune.target_shape is not None else []
    problems += search_problems_of(config, arch) if not problems else []
    if not problems:  # the floor of a wrong target shape would only repeat what was said
        problems += _budgets(config, arch)
    if problems:
        raise ConfigError(problems)


def _missing(config: Config) -> Iterator[str]:
    if not config.model.source:
        yield "--source is missing: give a Hugging Face directory or hub id"
    if not config.data.data_path and config.data.instruction_data is None:
        yield "--data-path is missing: give the prefix of a .bin/.idx pair (tools/preprocess_data.py writes them)"
    if not config.run.save and not config.run.load:
        yield "--save is missing: give the run directory to write"
    if config.run.finetune and not config.run.load:
        yield "--finetune needs --load: give the run directory whose weights to start from"
    elif config.run.finetune and (config.run.save is None or _same_place(config.run.save, config.run.load)):
        yield f"--finetune starts a run of its own: give a --save other than --load {config.run.load}"
    if config.train.train_iters == 0:
        yield f"--train-iters is {config.train.train_iters}: give the optimizer steps of the run, at least 1"


def _instructions(config: Config) -> Iterator[str]:
    """What does not go with instruction tuning."""
    path = config.data.instruction_data
    if path is None:
        return
    if config.data.data_path:
        yield f"--instruction-data {path} takes the place of --data-path: drop one of them"
    if config.run.eval_interval > 0:
        yield f"--instruction-data {path} has no validation part: give --eval-interval 0"
    if config.distill.distill_weight:
        yield f"--distill-weight does not go with --instruction-data {path}: drop it"
    if config.baseline.prunes_at_once:
        yield f"--few-shot-samples and --sheared-iters do not go with --instruction-data {path}: prune first"


def _same_place(one: str, other: str | None) -> bool:
    """Two spellings of one path, links included."""
    return other is not None and os.path.realpath(one) == os.path.realpath(other)


def _numbers(config: Config) -> Iterator[str]:
    """Ranges of single numbers."""
    optim, train, run = config.optim, config.train, config.run
    more_than_zero = {
        "lr": optim.lr,
        "continue_lr": optim.continue_lr,
        "adam_eps": optim.adam_eps,
        "exit_duration_in_mins": run.exit_duration_in_mins,
        "target_latency_ms": config.prune.target_latency_ms,
        "rollback_loss_jump": config.guard.rollback_loss_jump,
    }
    at_least_zero = {
        "min_lr": optim.min_lr,
        "weight_decay": optim.weight_decay,
        "clip_grad": optim.clip_grad,
        "lr_warmup_iters": optim.lr_warmup_iters,
        "continue_lr_warmup_iters": optim.continue_lr_warmup_iters,
        "prune_start_iter": config.prune.prune_start_iter,
        "prune_align": config.prune.prune_align,
        "save_interval": run.save_interval,
        "eval_interval": run.eval_interval,
        "seed": train.seed,
        "train_iters": train.train_iters,
    }
    at_least_one = {
        "seq_length": config.data.seq_length,
        "micro_batch_size": train.micro_batch_size,
        "global_batch_size": train.global_batch_size,
        "log_interval": run.log_interval,
        "eval_iters": run.eval_iters,
        "lr_wsd_decay_iters": optim.lr_wsd_decay_iters,
        "max_skipped_steps": config.guard.max_skipped_steps,
        "final_align": config.prune.final_align,
        "saliency_spike": config.guard.saliency_spike,
    }
    yield from _outside(more_than_zero, lambda value: value > 0, "must be above 0")
    yield from _outside(at_least_zero, lambda value: value >= 0, "must be 0 or more")
    yield from _outside(at_least_one, lambda value: value >= 1, "must be 1 or more")
    betas = {"adam_beta1": optim.adam_beta1, "adam_beta2": optim.adam_beta2}
    yield from _outside(betas, lambda value: 0 <= value < 1, "must be at least 0 and below 1")
    if train.seed >= _MAX_SEED:
        yield f"--seed {train.seed} must be below 2**63"
    if config.guard.rollback_loss_jump is not None and not run.save_interval:
        yield "--rollback-loss-jump needs checkpoints to go back to: give a --save-interval"
    if run.keep_last < _MIN_CHECKPOINTS:
        yield f"--keep-last {run.keep_last} must be {_MIN_CHECKPOINTS} or more, so that one is always whole"


def _outside(
    values: dict[str, float] | dict[str, float | None] | dict[str, int | None] | dict[str, int],
    allowed: Callable[[float], bool],
    rule: str,
) -> Iterator[str]:
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and allowed(value)):
            yield f"--{name.replace('_', '-')} {value} {rule}"


def _schedule(config: Config) -> Iterator[str]:
    optim, iters = config.optim, config.train.train_iters
    if optim.min_lr > optim.lr:
        yield f"--min-lr {optim.min_lr} is above --lr {optim.lr}: lower it"
    if optim.continue_lr is not None and optim.min_lr > optim.continue_lr:
        yield f"--min-lr {optim.min_lr} is above --continue-lr {optim.continue_lr}: lower it"
    if optim.lr_warmup_iters >= iters > 0:
        yield f"--lr-warmup-iters {optim.lr_warmup_iters} leaves nothing of --train-iters {iters}: shorten it"
    decay = optim.lr_wsd_decay_iters
    if optim.lr_decay_style == "WSD" and decay is None:
        yield "--lr-decay-style WSD needs --lr-wsd-decay-iters: give the steps of the final decay"
    if optim.lr_decay_style != "WSD" and decay is not None:
        yield f"--lr-wsd-decay-iters {decay} only goes with WSD, not --lr-decay-style {optim.lr_decay_style}: drop it"
    if decay is not None and 0 < iters < optim.lr_warmup_iters + decay:
        yield f"--lr-warmup-iters {optim.lr_warmup_iters} and --lr-wsd-decay-iters {decay} exceed --train-iters {iters}"


def _layout(config: Config, world_size: int) -> list[str]:
    """How the processes are arranged."""
    parallel = config.parallel
    sizes = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
    }
    problems = list(_outside(sizes, lambda value: value >= 1, "must be 1 or more"))
    if problems:
        return problems
    tensor, pipeline = sizes.values()
    if world_size % parallel.model_parallel_size:
        problems.append(
            f"--tensor-model-parallel-size {tensor} x --pipeline-model-parallel-size {pipeline} = {tensor * pipeline} "
            f"does not divide the {world_size} process(es) of this job: change one of them, or start another number"
        )
    if parallel.sequence_parallel and config.data.seq_length % tensor:
        problems.append(
            f"--seq-length {config.data.seq_length} is no multiple of --tensor-model-parallel-size {tensor}, which "
            "--sequence-parallel needs: change one of them"
        )
    return problems


def _batch(config: Config, copies: int) -> Iterator[str]:
    micro, batch = config.train.micro_batch_size, config.train.global_batch_size
    if min(micro, batch) >= 1 and batch % (micro * copies):
        of_model = f"{copies} {'copy' if copies == 1 else 'copies'} of the model"
        yield (
            f"--global-batch-size {batch} is no multiple of --micro-batch-size {micro} x {of_model} "
            f"= {micro * copies}: change one of them"
        )


def _split(config: Config) -> Iterator[str]:
    try:
        shares = [float(share) for share in config.data.split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(math.isfinite(share) and share >= 0 for share in shares) or not shares[0]:
        yield f"--split {config.data.split!r} must be three shares, the first above 0, such as 969,30,1"
    elif config.run.eval_interval > 0 and not shares[1]:
        yield f"--split {config.data.split!r} leaves nothing to validate on: give a second share or --eval-interval 0"


def _pruning(config: Config) -> Iterator[str]:
    prune, iters = config.prune, config.train.train_iters
    unknown = [axis for axis in prune.prune_axes if axis not in PRUNE_AXES]
    if unknown:
        hint = nearest(unknown[0], PRUNE_AXES)
        yield f"--prune-axes has unknown {unknown[0]!r}{hint or ': use ' + ', '.join(PRUNE_AXES)}"
    if len(set(prune.prune_axes)) != len(prune.prune_axes):
        yield f"--prune-axes {','.join(prune.prune_axes)} names an axis twice: keep one"
    yield from search_problems(config)
    if not prune.active:
        if prune.export_at:
            yield f"--export-at {','.join(prune.export_at)} needs pruning: give --target-params or another target"
        if config.optim.continue_lr is not None or config.optim.continue_lr_warmup_iters is not None:
            yield "--continue-lr and its warm-up follow pruning: without a target use --lr and --lr-warmup-iters"
        return
    if not prune.prune_axes:
        yield "--prune-axes is empty but there is a target: name at least one of " + ", ".join(PRUNE_AXES)
    if config.prune_start_iter >= iters > 0:
        yield f"pruning would start after step {config.prune_start_iter} of --train-iters {iters}: start it earlier"


def _syntax(config: Config) -> Iterator[str]:
    """Settings with a small language of their own."""
    prune = config.prune
    yield from _attempt("--prune-ratio", parse_ratio, prune.prune_ratio)
    yield from _attempt("--target-params", parse_count, prune.target_params)
    yield from _attempt("--target-kv-bytes", parse_count, prune.target_kv_bytes)
    yield from _attempt("--target-shape", parse_shape, prune.target_shape)
    yield from _attempt("--source-shape", parse_source_shape, config.model.source_shape)
    for mark in prune.export_budgets:
        yield from _attempt("--export-at", parse_count, mark)
    for choice in config.train.op_impl:
        op, equals, implementation = choice.partition("=")
        if not (op and equals and implementation):
            yield f"--op-impl {choice!r} is not OP=IMPLEMENTATION: write it like rms_norm=torch"


def _metric(config: Config) -> Iterator[str]:
    """What goes with what is measured."""
    prune, baseline = config.prune, config.baseline
    if prune.prune_hessian == "adam" and prune.prune_metric not in ("taylor-mixed", "diag-hessian"):
        yield f"--prune-hessian adam is of no use to --prune-metric {prune.prune_metric}, which has no H: drop it"
    elif prune.prune_hessian == "adam" and baseline.few_shot_samples is not None:
        yield "--prune-hessian adam knows nothing before training, when --few-shot-samples decides: use fisher"
    if prune.second_order and baseline.sheared_iters is not None:
        yield f"--second-order is no part of --sheared-iters {baseline.sheared_iters}, which trains its masks: drop one"
    if prune.second_order and not prune.active:
        yield "--second-order changes weights as groups go, and there is no target: give --target-params, or drop it"


def _attempt(flag: str, parse: Callable[[str], _Value], text: str | None) -> Iterator[str]:
    if text is None:
        return
    try:
        parse(text)
    except UserError as error:
        yield f"{flag}: {error}"


def _target_shape(config: Config, arch: Architecture) -> list[str]:
    prune = config.prune
    assert prune.target_shape is not None
    target = parse_shape(prune.target_shape).resolve(arch)
    widths = (arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads)
    problems = []
    axes = zip(("hidden", "ffn", "heads"), ("stem", "ffn", "attention"), target, widths, strict=True)
    for key, axis, least, width in axes:
        if least > width:
            problems.append(f"--target-shape {key}={least} is above the source's {width}: use at most {width}")
        elif least < width and axis not in prune.prune_axes:
            problems.append(f"--target-shape {key}={least} needs {axis!r} in --prune-axes {','.join(prune.prune_axes)}")
    if not problems and target == widths:
        problems.append(f"--target-shape {prune.target_shape} is the source's own shape: nothing to prune")
    return problems


def _budgets(config: Config, arch: Architecture) -> list[str]:
    """Parameter counts asked for against the largest and the smallest the run can have."""
    prune = config.prune
    if not prune.active:
        return []
    largest = arch.num_parameters()
    floor = floor_shape(prune, arch)
    if prune.target_kv_bytes is not None:  # where the search ends, and heads alone are pruned
        floor = floor[0], floor[1], heads_within_kv_bytes(prune, arch)
    lowest = shape_between(arch, *floor, prune.gqa_mode, "most").num_parameters()  # reached whichever K/V heads go
    if prune.replay is not None:
        lowest = 0  # the ledger says how far it goes
    asked = [("--target-params", prune.target_params)] if prune.target_params is not None else []
    problems = []
    for flag, text in [*asked, *(("--export-at", mark) for mark in prune.export_budgets)]:
        count = parse_count(text)
        if count >= largest:
            problems.append(f"{flag} {text} is not below the source's {largest:,} parameters: ask for less")
        elif count < lowest:
            widths = "hidden={},ffn={},heads={}".format(*floor)
            problems.append(f"{flag} {text} is below the floor of {lowest:,} parameters ({widths}): ask for more")
    if prune.target_params is not None:
        end = parse_count(prune.target_params)
        problems += [
            f"--export-at {mark} is below --target-params {prune.target_params}: the run ends before it"
            for mark in prune.export_budgets
            if parse_count(mark) < end
        ]
    return problems
