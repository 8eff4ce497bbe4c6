"""Every rule refuses what it should, names the flag, and lets the rest through."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_prune.config import Config, parse_source_shape, shape_between, validate_against_source, validate_config
from megatron_prune.config.yaml_file import with_values
from megatron_prune.errors import ConfigError

SOURCE = parse_source_shape("hidden=2048,ffn=8192,heads=32,kv_heads=32,head_dim=64,layers=24,vocab=49152,tied=1")


def _config(**values: object) -> Config:
    good = {"source": "models/a", "data_path": ("data/a",), "save": "runs/a", "train_iters": 10_000}
    return with_values(Config(), good | values)


def _problems(config: Config, world_size: int = 1) -> tuple[str, ...]:
    try:
        validate_config(config, world_size)
    except ConfigError as error:
        return error.problems
    return ()


def _source_problems(**values: object) -> tuple[str, ...]:
    try:
        validate_against_source(_config(**values), SOURCE)
    except ConfigError as error:
        return error.problems
    return ()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"target_params": "457M", "export_at": ("1.1B", "800M"), "continue_lr": 2e-3},
        {"target_shape": "hidden=1195,ffn=3006,heads=19", "prune_ratio": "4:1", "export_at": ("target",)},
        {"target_params": "457M", "prune_metric": "param_mix", "prune_hessian": "adam", "second_order": True},
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 1000},
        {"save": None, "load": "runs/a"},
        {"load": "runs/b", "finetune": True},
        {"split": "1,0,0", "eval_interval": 0},
        {"clip_grad": 0.0, "weight_decay": 0.0, "lr_warmup_iters": 0, "prune_align": 0},
        {"op_impl": ("rms_norm=torch",)},
    ],
)
def test_good(values: dict[str, object]) -> None:
    assert _problems(_config(**values)) == ()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"source": None}, "--source is missing"),
        ({"source": ""}, "--source is missing"),
        ({"data_path": ()}, "--data-path is missing"),
        ({"save": None}, "--save is missing"),
        ({"train_iters": 0}, "--train-iters is 0"),
        ({"lr": 0.0}, "--lr 0.0 must be above 0"),
        ({"lr": float("nan")}, "--lr nan must be above 0"),
        ({"lr": float("inf")}, "--lr inf must be above 0"),
        ({"adam_beta2": 1.0}, "--adam-beta2 1.0 must be at least 0 and below 1"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1 must be 0 or more"),
        ({"seq_length": 0}, "--seq-length 0 must be 1 or more"),
        ({"log_interval": 0}, "--log-interval 0 must be 1 or more"),
        ({"exit_duration_in_mins": 0.0}, "--exit-duration-in-mins 0.0 must be above 0"),
        ({"prune_align": -1}, "--prune-align -1 must be 0 or more"),
        ({"keep_last": 1}, "--keep-last 1 must be 2 or more"),
        ({"finetune": True}, "--finetune needs --load"),
        ({"finetune": True, "load": "runs/a"}, "give a --save other than --load runs/a"),
        ({"finetune": True, "load": "runs/b", "save": None}, "give a --save other than --load runs/b"),
        ({"finetune": True, "load": "./runs/a/"}, "give a --save other than --load ./runs/a/"),
        ({"finetune": True, "load": "runs/b/../a"}, "give a --save other than --load runs/b/../a"),
        ({"min_lr": 1.0}, "--min-lr 1.0 is above --lr 0.0005"),
        ({"min_lr": 4e-4, "continue_lr": 3e-4, "target_params": "1M"}, "--min-lr 0.0004 is above --continue-lr"),
        ({"lr_warmup_iters": 10_000}, "--lr-warmup-iters 10000 leaves nothing"),
        ({"lr_decay_style": "WSD"}, "needs --lr-wsd-decay-iters"),
        ({"lr_wsd_decay_iters": 5}, "only goes with WSD"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 9_999}, "exceed --train-iters 10000"),
        ({"micro_batch_size": 3}, "x 1 copy of the model = 3: change one of them"),
        ({"micro_batch_size": 0}, "--micro-batch-size 0 must be 1 or more"),
        ({"global_batch_size": 0}, "--global-batch-size 0 must be 1 or more"),
        ({"train_iters": -3, "lr_warmup_iters": 0}, "--train-iters -3 must be 0 or more"),
        ({"split": "1,2"}, "must be three shares"),
        ({"split": "0,1,1"}, "must be three shares"),
        ({"split": "a,1,1"}, "must be three shares"),
        ({"split": "1,0,0"}, "leaves nothing to validate on"),
        ({"prune_axes": ("atention",)}, "unknown 'atention', did you mean attention?"),
        ({"prune_axes": ("ffn", "ffn")}, "names an axis twice"),
        ({"prune_axes": (), "target_params": "1M"}, "--prune-axes is empty"),
        ({"prune_hessian": "adam"}, "--prune-hessian adam is of no use to --prune-metric taylor"),
        (
            {"target_params": "1M", "prune_hessian": "adam", "prune_metric": "diag-hess", "few_shot_samples": 8},
            "adam knows",
        ),
        ({"second_order": True}, "--second-order changes weights as groups go, and there is no target"),
        ({"second_order": True, "sheared_iters": 9, "target_shape": "heads=8"}, "is no part of --sheared-iters 9"),
        ({"target_params": "1M", "target_shape": "hidden=3"}, "are both given"),
        ({"export_at": ("1M",)}, "--export-at 1M needs pruning"),
        ({"export_at": ("target",)}, "--export-at target needs pruning"),
        ({"export_at": ("targets",), "target_params": "1M"}, "--export-at: 'targets' is not a count"),
        ({"continue_lr": 1e-3}, "--continue-lr and its warm-up follow pruning"),
        ({"continue_lr_warmup_iters": 1}, "--continue-lr and its warm-up follow pruning"),
        ({"prune_start_iter": 10_000, "target_params": "1M"}, "start after step 10000 of --train-iters 10000"),
        ({"prune_ratio": "69"}, "--prune-ratio: '69' is not a ratio"),
        ({"target_params": "x"}, "--target-params: 'x' is not a count"),
        ({"target_shape": "x=1"}, "--target-shape: unknown key 'x'"),
        ({"source_shape": "hidden=1"}, "--source-shape: source shape 'hidden=1' lacks"),
        ({"export_at": ("1.1B", "x"), "target_params": "1M"}, "--export-at: 'x' is not a count"),
        ({"op_impl": ("rms_norm",)}, "--op-impl 'rms_norm' is not OP=IMPLEMENTATION"),
    ],
)
def test_one_problem_each(values: dict[str, object], words: str) -> None:
    (problem,) = _problems(_config(**values))
    assert words in problem
    assert "\n" not in problem


def test_all_problems_together() -> None:
    broken = with_values(Config(), {"lr": -1.0, "keep_last": 0, "micro_batch_size": 3})
    assert len(_problems(broken)) == 8  # four things missing, lr, min_lr above it, keep_last, batch


def test_batch_depends_on_the_processes() -> None:
    assert _problems(_config(micro_batch_size=8), world_size=32) == ()
    assert "x 40 copies of the model = 320" in _problems(_config(micro_batch_size=8), world_size=40)[0]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"target_params": "457M", "export_at": ("1.1B", "457M", "target")},
        {"target_shape": "hidden=1195,ffn=3006,heads=19", "export_at": ("1.1B",)},
        {"target_shape": "heads=19", "prune_axes": ("attention",)},
    ],
)
def test_good_against_source(values: dict[str, object]) -> None:
    assert _source_problems(**values) == ()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"target_params": "1.8B"}, "--target-params 1.8B is not below the source's 1,711,376,384"),
        ({"target_params": "3M"}, "is below the floor of"),
        ({"target_params": "60M", "prune_axes": ("ffn",)}, "(hidden=2048,ffn=64,heads=32)"),
        ({"target_params": "457M", "export_at": ("2B",)}, "--export-at 2B is not below the source's"),
        ({"target_params": "457M", "export_at": ("400M",)}, "--export-at 400M is below --target-params 457M"),
        ({"target_shape": "heads=19", "export_at": ("1M",)}, "--export-at 1M is below the floor"),
        ({"target_shape": "hidden=4096"}, "--target-shape hidden=4096 is above the source's 2048"),
        ({"target_shape": "hidden=2048"}, "is the source's own shape"),
        ({"target_shape": "hidden=64", "prune_axes": ("ffn",)}, "needs 'stem' in --prune-axes ffn"),
        (
            {"source_shape": "hidden=2048,ffn=8192,heads=32,layers=23,vocab=49152,tied=1"},
            "not the source's shape (layers 23, source 24)",
        ),
    ],
)
def test_one_problem_each_against_source(values: dict[str, object], words: str) -> None:
    (problem,) = _source_problems(**values)
    assert words in problem


def test_the_floor_is_what_every_run_can_reach() -> None:
    """Where two of six query heads stay, so may two K/V heads; a budget that only one would meet is too low."""
    source = parse_source_shape("hidden=64,ffn=64,heads=6,kv_heads=2,head_dim=64,layers=2,vocab=10,tied=1")
    most = shape_between(source, 64, 64, 2, kv_heads="most").num_parameters()
    assert most > shape_between(source, 64, 64, 2).num_parameters()
    attention = {"prune_axes": ("attention",), "final_align": 128}
    validate_against_source(_config(target_params=str(most), **attention), source)
    with pytest.raises(ConfigError, match=f"is below the floor of {most:,} parameters"):
        validate_against_source(_config(target_params=str(most - 1), **attention), source)


def test_attention_window() -> None:
    narrow = dataclasses.replace(SOURCE, sliding_window=1024)
    with pytest.raises(ConfigError, match="--seq-length 2048 is longer than the source's attention window of 1024"):
        validate_against_source(_config(), narrow)
