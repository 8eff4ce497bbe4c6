"""The trainer's flags that make an instruction tuning."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_prune.config import load_config, validate_config
from megatron_prune.errors import UserError
from megatron_prune.tuning import Tuning, check, check_target, samples_of, trainer_flags


def model_directory(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def test_defaults_are_what_the_trainer_accepts_and_the_user_s_flags_win(tmp_path: Path) -> None:
    tuning = Tuning(model_directory(tmp_path), tmp_path / "data.json", tmp_path / "save")
    check(tuning, [])
    config = load_config(trainer_flags(tuning, 1219, 4, []))
    validate_config(config, 4)
    assert (config.train.train_iters, config.optim.lr_warmup_iters, config.optim.lr) == (1219, 36, 2e-5)
    assert (config.optim.lr_decay_style, config.optim.weight_decay, config.run.finetune) == ("cosine", 0.0, False)
    own = load_config(trainer_flags(tuning, 1219, 4, ["--micro_batch_size=2", "--weight-decay", "0.1"]))
    assert (own.train.micro_batch_size, own.optim.weight_decay) == (2, 0.1)


def test_a_run_directory_is_taken_in_the_shape_it_has(tmp_path: Path) -> None:
    for name in ("checkpoints", "source"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "source" / "config.json").write_text("{}")
    tuning = Tuning(tmp_path / "run", tmp_path / "data.json", tmp_path / "save")
    check(tuning, [])
    config = load_config(trainer_flags(tuning, 10, 1, []))
    assert config.run.finetune
    assert config.run.load == str(tmp_path / "run")
    assert config.model.source == str(tmp_path / "run" / "source")


def test_a_tokenizer_that_is_given_is_the_one_that_counts_the_steps(tmp_path: Path, repo_root: Path) -> None:
    demo, model = repo_root / "examples" / "demo", model_directory(tmp_path)
    tuning = Tuning(model, demo / "instructions.json", tmp_path / "save", tokenizer=str(demo / "source"))
    assert len(samples_of(tuning, 2048)) == 84
    assert load_config(trainer_flags(tuning, 10, 1, [])).model.tokenizer == str(demo / "source")


@pytest.mark.parametrize(("batch", "copies", "expected"), [(128, 4, 4), (8, 4, 2), (6, 2, 1), (12, 1, 4), (1, 4, 1)])
def test_micro_batches_divide_a_copy_s_share(tmp_path: Path, batch: int, copies: int, expected: int) -> None:
    tuning = Tuning(tmp_path, tmp_path, tmp_path, global_batch_size=batch)
    assert load_config(trainer_flags(tuning, 10, copies, [])).train.micro_batch_size == expected


@pytest.mark.parametrize("flag", ["--train-iters", "--data_path=x", "--config"])
def test_flags_that_would_contradict(tmp_path: Path, flag: str) -> None:
    with pytest.raises(UserError, match="is set by finetune.py itself"):
        check(Tuning(model_directory(tmp_path), tmp_path, tmp_path), [flag])


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a Hugging Face model directory nor the --save of a run"):
        check(Tuning(tmp_path, tmp_path, tmp_path), [])


@pytest.mark.parametrize("flag", ["epochs", "lr"])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_numbers_that_make_no_training(tmp_path: Path, flag: str, value: float) -> None:
    numbers = {flag: value}
    tuning = Tuning(model_directory(tmp_path), tmp_path, tmp_path, **numbers)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"--{flag} {value} must be above 0 and finite"):
        check(tuning, [])


def test_the_model_is_not_written_over(tmp_path: Path) -> None:
    model = model_directory(tmp_path)
    with pytest.raises(UserError, match="--save .* is the model to tune; give another directory"):
        check(Tuning(model, tmp_path, model.parent / "x" / ".." / "model"), [])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-path", "x"], "takes the place of --data-path"),
        (["--eval-interval", "5"], "has no validation part"),
        (["--distill-weight", "0.5"], "--distill-weight does not go with"),
    ],
)
def test_what_does_not_go_with_instructions(flags: list[str], message: str) -> None:
    given = ["--instruction-data", "x.json", "--source", "m", "--save", "s", "--train-iters", "1000"]
    with pytest.raises(UserError, match=message):
        validate_config(load_config([*given, "--eval-interval", "0", *flags]), 1)


def test_a_model_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    check_target(tmp_path / "new", "checkpoints")
    (tmp_path / "export").mkdir()
    with pytest.raises(UserError, match="that is not of this tuning"):
        check_target(tmp_path, "checkpoints")
    (tmp_path / "checkpoints").mkdir()
    check_target(tmp_path, "checkpoints")


@pytest.mark.parametrize("beside", ["checkpoints", "adapter"])
def test_the_directory_of_another_run_is_left_as_it_is(tmp_path: Path, beside: str) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    check_target(tmp_path, beside)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}')
    with pytest.raises(UserError, match="is the directory of another run"):
        check_target(tmp_path, beside)
    (tmp_path / "config.yaml").write_text("instruction_data: null")
    with pytest.raises(UserError, match="is the directory of another run"):
        check_target(tmp_path, beside)


def test_a_tuning_that_has_no_checkpoint_yet_begins_anew_but_takes_no_adapters(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("instruction_data: x.json")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}')
    check_target(tmp_path, "checkpoints")
    with pytest.raises(UserError, match="is the directory of another run"):
        check_target(tmp_path, "adapter")
