"""The derived DeepSpeed configuration, also as DeepSpeed itself understands it."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_prune.config import Config, deepspeed_config
from megatron_prune.config.yaml_file import with_values


@pytest.mark.parametrize("world_size", [1, 2, 32])
def test_batch_sizes_multiply(world_size: int) -> None:
    derived = deepspeed_config(with_values(Config(), {"micro_batch_size": 4, "global_batch_size": 512}), world_size)
    product = derived["train_micro_batch_size_per_gpu"] * derived["gradient_accumulation_steps"] * world_size
    assert product == derived["train_batch_size"] == 512


def test_stage_one_without_round_robin() -> None:
    assert deepspeed_config(Config(), 1)["zero_optimization"] == {
        "stage": 1,
        "round_robin_gradients": False,
        "contiguous_gradients": False,
    }


def test_precision_and_recompute() -> None:
    fp32 = deepspeed_config(with_values(Config(), {"precision": "fp32"}), 1)
    assert "bf16" not in fp32
    assert "data_types" not in fp32
    assert "communication_data_type" not in fp32
    bf16 = deepspeed_config(with_values(Config(), {"precision": "bf16", "recompute": True, "clip_grad": 0.5}), 1)
    assert bf16["bf16"]["enabled"] is True
    assert bf16["data_types"]["grad_accum_dtype"] == "fp32"
    assert bf16["gradient_clipping"] == 0.5
    assert bf16["pipeline"]["use_reentrant"] is False
    assert bf16["pipeline"]["activation_checkpoint_interval"] == 1
    assert fp32["pipeline"]["activation_checkpoint_interval"] == 0


def test_deepspeed_reads_it_as_meant() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = with_values(Config(), {"micro_batch_size": 4, "global_batch_size": 32, "clip_grad": 0.7})
    read = DeepSpeedConfig(json.loads(json.dumps(deepspeed_config(config, 1))))
    assert read.zero_optimization_stage == 1
    assert read.zero_config.round_robin_gradients is False
    assert read.bfloat16_config.enabled is True
    assert read.grad_accum_dtype == "fp32"
    assert read.communication_data_type == torch.float32
    assert read.gradient_accumulation_steps == 8
    assert read.gradient_clipping == 0.7
    assert read.pipeline["use_reentrant"] is False
    assert read.zero_allow_untested_optimizer is True
