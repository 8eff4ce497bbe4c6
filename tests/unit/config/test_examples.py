"""The example files are complete, consistent and agree with the paper's Table 10."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prune.config import (
    load_config,
    parse_source_shape,
    validate_against_source,
    validate_config,
)

#: Table 10 and Appendix C: file, tokens per step, peak learning rate, warm-up, GPUs.
TABLE_10 = [
    ("smollm_1.7b_to_457m", 2**20, 5e-4, 500, 32),
    ("smollm_360m_to_134m", 2**21, 2e-3, 500, 32),
    ("continue", 2**20, 2e-3, 10_000, 32),
]


def _examples(root: Path) -> list[Path]:
    return sorted([*(root / "examples").glob("*.yaml"), *(root / "examples" / "baselines").glob("*.yaml")])


def test_all_are_valid(repo_root: Path) -> None:
    paths = _examples(repo_root)
    stems = {path.stem for path in paths}
    assert {"smollm_1.7b_to_457m", "smollm_360m_to_134m", "llama2_7b", "qwen2.5_7b", "continue"} <= stems
    assert {"few_shot", "sheared", "direct"} <= stems
    for path in paths:
        config = load_config(["--config", str(path), "--save", "runs/x"])
        validate_config(config, world_size=32)
        if config.model.source_shape is not None:
            validate_against_source(config, parse_source_shape(config.model.source_shape))


@pytest.mark.parametrize(("name", "batch_tokens", "lr", "warmup", "gpus"), TABLE_10)
def test_table_10(repo_root: Path, name: str, batch_tokens: int, lr: float, warmup: int, gpus: int) -> None:
    config = load_config(["--config", str(repo_root / "examples" / f"{name}.yaml"), "--save", "runs/x"])
    assert config.batch_tokens == batch_tokens
    assert (config.optim.lr, config.optim.lr_warmup_iters, config.data.seq_length) == (lr, warmup, 2048)
    validate_config(config, gpus)


def test_second_stage_of_the_457m_run(repo_root: Path) -> None:
    config = load_config(["--config", str(repo_root / "examples" / "smollm_1.7b_to_457m.yaml")])
    assert (config.optim.continued_lr, config.optim.continued_warmup_iters) == (2e-3, 10_000)
    plain = load_config(["--lr", "1e-3", "--lr-warmup-iters", "7"])
    assert (plain.optim.continued_lr, plain.optim.continued_warmup_iters) == (1e-3, 7)


def test_forty_gpus_of_the_continued_stage(repo_root: Path) -> None:
    """The batch that the comment in continue.yaml proposes for the 40 GPUs of Table 10."""
    path = str(repo_root / "examples" / "continue.yaml")
    validate_config(load_config(["--config", path, "--global-batch-size", "520", "--micro-batch-size", "13"]), 40)
