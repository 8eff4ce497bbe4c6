"""DeepSpeed's configuration, derived: there is no second place to set things."""

from __future__ import annotations

import sys
from typing import Any

from megatron_prune.config.schema import Config


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``; JSON-ready. The optimizer is the caller's own.

    Args:
        config: a config that passed ``validate_config`` for the same world size.
        world_size: processes of the job.

    ZeRO stage 1 always: stage 0 in fp32 under a pipeline clips by the norm of the first stage alone, and stages 2 and
    3 refuse pipelines.
    """
    train = config.train
    samples_at_once = train.micro_batch_size * config.parallel.data_parallel_size(world_size)
    assert train.global_batch_size % samples_at_once == 0, "validate_config was not called"
    derived: dict[str, Any] = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // samples_at_once,
        "gradient_clipping": config.optim.clip_grad,
        "zero_optimization": {
            "stage": 1,
            # Saliency reads each parameter's fragment of the gradient; round robin breaks that look-up.
            "round_robin_gradients": False,
            # Under a pipeline DeepSpeed would allocate whole buckets, 2 GB each, anew at every step.
            "contiguous_gradients": False,
        },
        # The optimizer may be one that DeepSpeed does not list, such as transformer-engine's FusedAdam.
        "zero_allow_untested_optimizer": True,
        # Reentrant recomputation of the embedding has no gradient to start from and leaves the next stage waiting.
        "pipeline": {
            "use_reentrant": False,
            "activation_checkpoint_interval": int(train.recompute),
            # DeepSpeed would send each tensor-parallel rank a part of what it takes for copies; under sequence
            # parallelism they are no copies.
            "pipe_partitioned": False,
            "grad_partitioned": False,
        },
        # The run reports for itself; DeepSpeed divides by this number, so it cannot be zero or absent.
        "steps_per_print": sys.maxsize,
        "wall_clock_breakdown": False,
    }
    if train.precision == "bf16":
        # Else fp32 sums take the gradients after the backward pass, and DeepSpeed clears all bf16 ones as soon as that
        # reaches the pipeline's output. The loss lies beyond it: an untied output head would never learn, nor would a
        # tied one on a stage of its own.
        derived["bf16"] = {"enabled": True, "immediate_grad_update": True}
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
        # Unset, it is the model's: the fp32 sums, which saliency reads, would be rounded to bf16 to be added up over
        # the copies of the model, even a single one, and 2 bytes for each parameter would hold them meanwhile.
        derived["communication_data_type"] = "fp32"
    return derived
