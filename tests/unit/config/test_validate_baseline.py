"""What goes with pruning all at once, with distillation and with a growing micro-batch, and what does not."""

from __future__ import annotations

import re

import pytest

from megatron_prune.config import Config
from megatron_prune.config.validate_baseline import baseline_problems
from megatron_prune.config.yaml_file import with_values

SHAPE = "hidden=1195,ffn=3006,heads=19"
SHEARED = {"sheared_iters": 100, "target_shape": SHAPE}


def problems(values: dict[str, object], world_size: int = 1) -> str:
    return "\n".join(baseline_problems(with_values(Config(), values), world_size))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"few_shot_samples": 128, "target_params": "457M", "micro_batch_size": 8},
        {"few_shot_samples": 128, "target_shape": SHAPE, "tensor_model_parallel_size": 4},
        SHEARED,
        {"distill_weight": 0.5, "distill_temperature": 2.0},
        {"distill_weight": 1.0},
        {"grow_micro_batch": True, "target_params": "457M"},
        {"grow_micro_batch": True, "target_params": "457M", "prune_metric": "diag-hessian", "prune_hessian": "adam"},
    ],
)
def test_good(values: dict[str, object]) -> None:
    assert problems(values, 4) == ""


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"few_shot_samples": 128}, "--few-shot-samples 128 needs a target"),
        ({"few_shot_samples": 0, "target_shape": SHAPE}, "--few-shot-samples 0 must be 1 or more"),
        ({"few_shot_samples": 12, "target_shape": SHAPE}, "--few-shot-samples 12 is no multiple .* = 8"),
        ({"few_shot_samples": 128, "target_shape": SHAPE, "prune_start_iter": 3}, "drop --prune-start-iter 3"),
        ({"few_shot_samples": 128, "replay": "a/ledger.jsonl"}, "drop --replay a/ledger.jsonl"),
        ({"few_shot_samples": 128, **SHEARED}, "--few-shot-samples 128 and --sheared-iters 100 are both given"),
        ({"sheared_iters": 100}, "--sheared-iters 100 needs a target"),
        ({"sheared_iters": 0, "target_shape": SHAPE}, "--sheared-iters 0 must be 2 or more"),
        ({"sheared_iters": 100, "target_params": "457M"}, "--sheared-iters 100 needs a shape"),
        ({**SHEARED, "tensor_model_parallel_size": 2}, "--sheared-iters 100 runs data parallel only"),
        ({**SHEARED, "pipeline_model_parallel_size": 2}, "--sheared-iters 100 runs data parallel only"),
        ({**SHEARED, "gqa_mode": "balanced"}, "drop --gqa-mode balanced"),
        ({**SHEARED, "trajectory": ("stem", "ffn", "attention")}, "drop --trajectory stem,ffn,attention"),
        ({**SHEARED, "compile": True}, "drop --compile"),
        ({**SHEARED, "sheared_lr": 0.0}, "--sheared-lr 0.0 must be above 0"),
        ({"distill_weight": 1.5}, "--distill-weight 1.5 must be from 0 to 1"),
        ({"distill_weight": 0.5, "distill_temperature": 0.0}, "--distill-temperature 0.0 must be above 0"),
        ({"distill_weight": 0.5, "finetune": True}, "--finetune does not read"),
        ({"distill_temperature": 2.0}, "--distill-temperature 2.0 is that of a teacher"),
        ({"grow_micro_batch": True}, "--grow-micro-batch follows a model that shrinks"),
        ({"grow_micro_batch": True, "target_params": "1B", "prune_align": 0}, "which --prune-align 0 never does"),
        ({**SHEARED, "prune_cost": "latency"}, "drop --prune-cost latency"),
        ({**SHEARED, "prune_metric": "obc"}, "drop --prune-metric obc"),
        ({**SHEARED, "saliency_norm": "sum"}, "drop --saliency-norm sum"),
        ({**SHEARED, "saliency_spike": 9.0}, "drop --saliency-spike"),
        ({"grow_micro_batch": True, "target_params": "1B", "prune_metric": "diag-hessian"}, "--prune-hessian adam"),
    ],
)
def test_bad(values: dict[str, object], words: str) -> None:
    assert re.search(words, problems({"micro_batch_size": 2, **values}, 4)), problems(values, 4)


def test_pruning_starts_where_the_baseline_says() -> None:
    assert with_values(Config(), {"few_shot_samples": 8, "target_shape": SHAPE}).prune_start_iter == 0
    assert with_values(Config(), SHEARED).prune_start_iter == 100
