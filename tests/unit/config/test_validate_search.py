"""Rules about budgets, trajectories, replays, grouped heads and alignment."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_prune.config import Config, parse_source_shape, validate_against_source, validate_config
from megatron_prune.config.yaml_file import with_values
from megatron_prune.errors import ConfigError

GROUPED = "hidden=960,ffn=2560,heads=15,kv_heads=5,head_dim=64,layers=4,vocab=49152,tied=1"
PLAIN = GROUPED.replace("kv_heads=5", "kv_heads=15")
RUNNABLE = {"source": "model", "data_path": ("data",), "save": "runs/x", "train_iters": 1000, "lr_warmup_iters": 10}


def problems(values: dict[str, Any], source: str | None = None) -> list[str]:
    config = with_values(Config(), RUNNABLE | values)
    try:
        validate_config(config, 1)
        if source is not None:
            validate_against_source(config, parse_source_shape(source))
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    "values",
    [
        {"target_latency_ms": 12.5, "prune_cost": "latency", "gqa_mode": "balanced"},
        {"target_kv_bytes": "4K", "gqa_mode": "balanced"},
        {"target_params": "50M", "final_align": 256, "saliency_norm": "flops"},
        {"target_params": "50M", "final_align": 64, "gqa_mode": "balanced", "prune_cost": "kv-bytes"},
        {"target_shape": "hidden=700,ffn=900,heads=5", "trajectory": ("stem", "attention", "ffn")},
        {"target_shape": "hidden=700,ffn=900", "trajectory": ("ffn", "stem")},
        {"target_shape": "heads=4", "gqa_mode": "balanced"},
        {"replay": "runs/y/ledger.jsonl", "trajectory": ("stem", "attention", "ffn")},
        {"replay": "runs/y/ledger.jsonl", "target_params": "50M"},
    ],
)
def test_right_settings_pass(values: dict[str, Any]) -> None:
    assert problems(values, GROUPED) == []


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"target_latency_ms": 0.0}, "--target-latency-ms 0.0 must be above 0"),
        ({"target_kv_bytes": "x"}, "--target-kv-bytes: 'x' is not a count"),
        ({"target_kv_bytes": "4K", "target_params": "1M"}, "are both given"),
        ({"target_kv_bytes": "4K", "target_params": "1M", "target_shape": "ffn=3"}, "are all given"),
        ({"target_kv_bytes": "4K", "prune_axes": ("ffn",)}, "needs attention in --prune-axes ffn"),
        ({"target_params": "1M", "final_align": 0}, "--final-align 0 must be 1 or more"),
        ({"target_shape": "ffn=30", "final_align": 8}, "--final-align 8 is about where a search ends"),
        ({"final_align": 8}, "--final-align 8 is about where a search ends"),
        ({"target_params": "1M", "prune_cost": "flops", "saliency_norm": "sum"}, "takes the place of"),
        ({"target_params": "1M", "trajectory": ("stem", "ffn")}, "needs to know where each axis ends"),
        ({"target_shape": "ffn=3", "trajectory": ("stem", "fnn")}, "'fnn', did you mean ffn?"),
        ({"target_shape": "ffn=3", "trajectory": ("unified", "ffn")}, "mixes unified, which lets all axes shrink to"),
        ({"target_shape": "ffn=3", "trajectory": ("unifed",)}, "'unifed', did you mean unified?"),
        ({"target_shape": "ffn=3", "trajectory": ("hidden", "ffn")}, "'hidden': give unified, or an order of attent"),
        ({"target_shape": "ffn=3", "trajectory": ("ffn", "ffn")}, "names ffn twice, and an axis shrinks in one go"),
        ({"target_shape": "ffn=3", "trajectory": ()}, "--trajectory is empty: give unified, or an order of"),
        ({"replay": "runs/y/ledger.jsonl", "prune_cost": "params"}, "--prune-cost params has nothing to choose"),
        ({"replay": "runs/y/ledger.jsonl", "prune_metric": "wanda"}, "--prune-metric wanda has nothing to choose"),
        ({"replay": "runs/y/ledger.jsonl", "prune_hessian": "adam"}, "--prune-hessian adam has nothing to choose"),
        ({"replay": "runs/y/ledger.jsonl", "saliency_norm": "sum"}, "--saliency-norm sum has nothing to choose"),
        ({"replay": "runs/y/ledger.jsonl", "saliency_spike": 9.0}, "--saliency-spike 9.0 has nothing to choose"),
        ({"target_params": "1M", "saliency_ema": 1.0}, "--saliency-ema 1 is the weight"),
        ({"target_params": "1M", "saliency_ema": 0.9, "prune_metric": "random"}, "nothing to average under --prune"),
        ({"replay": "runs/y/ledger.jsonl", "saliency_ema": 0.9}, "has nothing to average under --replay"),
        (
            {"replay": "runs/y/ledger.jsonl", "target_params": "1M", "final_align": 8},
            "--final-align 8 has nothing to choose under --replay runs/y/ledger.jsonl",
        ),
        ({"replay": "runs/y/ledger.jsonl", "prune_axes": ("ffn",)}, "--prune-axes ffn says nothing of --replay"),
        ({"replay": "./runs/x/ledger.jsonl"}, "is the ledger that this run writes"),
    ],
)
def test_wrong_settings_are_explained(values: dict[str, Any], problem: str) -> None:
    found = problems(values)
    assert any(problem in line for line in found), found


@pytest.mark.parametrize(
    ("values", "source", "problem"),
    [
        ({"target_latency_ms": 3.0}, GROUPED, "--target-latency-ms 3.0 counts the K/V heads"),
        ({"target_kv_bytes": "4K"}, GROUPED, "give --gqa-mode balanced"),
        ({"target_params": "50M", "prune_cost": "latency"}, GROUPED, "--prune-cost latency counts the K/V heads"),
        ({"target_kv_bytes": "1B"}, PLAIN, "is not below the source's 15,360 bytes a token"),
        ({"target_kv_bytes": "100"}, PLAIN, "is less than 1 of the source's heads take"),
        ({"target_shape": "heads=7", "gqa_mode": "balanced"}, GROUPED, "use one of 10, 5, 4, 3, 2, 1"),
        ({"target_shape": "ffn=9,heads=5", "trajectory": ("ffn",)}, GROUPED, "lacks attention, which --target-shape"),
        ({"target_params": "50M", "final_align": 1024}, PLAIN, "--final-align 1024 is above the source's hidden 960"),
        (
            {"target_params": "50M", "final_align": 7, "gqa_mode": "balanced"},
            GROUPED.replace("heads=15", "heads=10"),
            "no number of",
        ),
    ],
)
def test_what_the_source_makes_of_them(values: dict[str, Any], source: str, problem: str) -> None:
    found = problems(values, source)
    assert any(problem in line for line in found), found


@pytest.mark.parametrize("values", [{"sheared_iters": 9}, {"sheared_iters": 9, "target_shape": "ffn=3"}])
def test_masks_beside_a_ledger_are_one_mistake(values: dict[str, Any]) -> None:
    (problem,) = problems({"replay": "runs/y/ledger.jsonl", **values})
    assert problem == "--sheared-iters 9 decides what goes: drop --replay runs/y/ledger.jsonl"


def test_how_far_a_ledger_goes_is_not_known_from_the_settings() -> None:
    assert problems({"replay": "runs/y/ledger.jsonl", "target_params": "1", "prune_align": 64}, GROUPED) == []


def test_heads_that_stay_need_no_balance() -> None:
    assert problems({"target_latency_ms": 3.0, "prune_axes": ("ffn", "stem")}, GROUPED) == []
