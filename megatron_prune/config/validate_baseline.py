"""The rules of what pruning is compared with, of distillation and of a micro-batch that grows."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_prune.config.schema import Config


def baseline_problems(config: Config, world_size: int) -> Iterator[str]:
    """What is wrong with these settings, one line each.

    Args:
        config: the settings.
        world_size: processes of the job.
    """
    yield from _few_shot(config, world_size)
    yield from _sheared(config)
    yield from _distillation(config)
    yield from _growth(config)


def _growth(config: Config) -> Iterator[str]:
    prune = config.prune
    if not config.train.grow_micro_batch:
        return
    if not prune.active:
        yield "--grow-micro-batch follows a model that shrinks, and there is no target: give one, or drop it"
    elif not prune.prune_align:
        yield "--grow-micro-batch grows where tensors are cut, which --prune-align 0 never does: give a multiple"
    elif prune.prune_metric in ("taylor-mixed", "diag-hessian") and prune.prune_hessian == "fisher":
        yield (
            f"--grow-micro-batch changes what --prune-metric {prune.prune_metric} measures, the gradients of single "
            "micro-batches: drop it, or give --prune-hessian adam"
        )


def _few_shot(config: Config, world_size: int) -> Iterator[str]:
    samples, iters = config.baseline.few_shot_samples, config.baseline.sheared_iters
    if samples is None:
        return
    flag = f"--few-shot-samples {samples}"
    if iters is not None:
        yield f"{flag} and --sheared-iters {iters} are both given: keep one way to prune"
    yield from _at_once(config, flag)
    micro = config.train.micro_batch_size
    if samples < 1:
        yield f"{flag} must be 1 or more"
    elif micro >= 1 and min(_sizes(config)) >= 1:
        at_once = micro * max(1, config.parallel.data_parallel_size(world_size))
        if samples % at_once:
            yield f"{flag} is no multiple of --micro-batch-size x copies of the model = {at_once}: change one of them"


def _sheared(config: Config) -> Iterator[str]:
    baseline, prune = config.baseline, config.prune
    if not (math.isfinite(baseline.sheared_lr) and baseline.sheared_lr > 0):
        yield f"--sheared-lr {baseline.sheared_lr} must be above 0"
    if baseline.sheared_iters is None:
        return
    flag = f"--sheared-iters {baseline.sheared_iters}"
    yield from _at_once(config, flag)
    if baseline.sheared_iters < 2:
        yield f"{flag} must be 2 or more: the last step has masks of 0 and 1, which those before it have learned"
    if prune.active and prune.replay is None and prune.target_shape is None:
        yield f"{flag} needs a shape to lead its masks to: give --target-shape in place of the other target"
    if max(_sizes(config)) > 1:
        yield f"{flag} runs data parallel only: give --tensor- and --pipeline-model-parallel-size 1"
    if prune.gqa_mode != "cluster":
        yield f"{flag} learns a mask for each query head: drop --gqa-mode {prune.gqa_mode}"
    if prune.prune_cost is not None:
        yield f"{flag} lets its masks choose: drop --prune-cost {prune.prune_cost}"
    if prune.saliency_norm != "mean":
        yield f"{flag} lets its masks choose: drop --saliency-norm {prune.saliency_norm}"
    if prune.prune_metric != "taylor":
        yield f"{flag} lets its masks choose: drop --prune-metric {prune.prune_metric}"
    if prune.order is not None:
        yield f"{flag} shrinks all axes together: drop --trajectory {','.join(prune.order)}"
    if config.train.compile:
        yield f"{flag} changes its masks at every step, which --compile would compile anew: drop --compile"


def _at_once(config: Config, flag: str) -> Iterator[str]:
    """What goes with no way of pruning all at once."""
    prune = config.prune
    if prune.prune_start_iter is not None:
        yield f"{flag} says when to prune: drop --prune-start-iter {prune.prune_start_iter}"
    if config.guard.rollback_loss_jump is not None:
        yield f"{flag} prunes at once, with nothing to go back to: drop --rollback-loss-jump"
    if config.guard.saliency_spike is not None:
        yield f"{flag} prunes at once, with no removals before to compare with: drop --saliency-spike"
    if prune.replay is not None:
        yield f"{flag} decides what goes: drop --replay {prune.replay}"
    elif not prune.active:
        yield f"{flag} needs a target: give --target-shape, or with --few-shot-samples any other"


def _distillation(config: Config) -> Iterator[str]:
    weight, temperature = config.distill.distill_weight, config.distill.distill_temperature
    if not 0 <= weight <= 1:
        yield f"--distill-weight {weight} must be from 0 to 1"
    if not (math.isfinite(temperature) and temperature > 0):
        yield f"--distill-temperature {temperature} must be above 0"
    elif temperature != 1 and weight == 0:
        yield f"--distill-temperature {temperature} is that of a teacher: give --distill-weight, or drop it"
    if weight and config.run.finetune:
        yield f"--distill-weight {weight} learns from --source, which --finetune does not read: drop one of them"


def _sizes(config: Config) -> tuple[int, int]:
    return config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
