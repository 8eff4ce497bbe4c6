"""``--grow-micro-batch``: more samples at a time for a model that has become smaller, in the memory that it had.

The loss is the mean over all tokens of the global batch, so the results are those of the smaller micro-batch to
rounding. The size is a function of the physical widths alone: a run that resumes on the same layout takes the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from megatron_prune.architecture import Architecture
from megatron_prune.config import Config
from megatron_prune.memory import stage_memory
from megatron_prune.parallel.partition import Partition


def micro_batch_rule(config: Config, source: Architecture, num_gpus: int) -> Callable[[Partition], int] | None:
    """Samples per forward pass under a placement, or None where the flag is not set.

    That is the largest multiple of ``--micro-batch-size`` that divides a copy's samples, leaves every pipeline stage
    something to do, and with which no stage holds more activations than it did for the source.

    Args:
        config: checked settings.
        source: the model before pruning.
        num_gpus: all processes.
    """
    if not config.train.grow_micro_batch:
        return None
    base = config.train.micro_batch_size
    samples = config.train.global_batch_size // config.parallel.data_parallel_size(num_gpus)
    stages = min(config.parallel.pipeline_model_parallel_size, samples // base)
    sizes = [size for size in range(base, samples // stages + 1, base) if samples % size == 0]

    def held(arch: Architecture, size: int) -> list[int]:
        sized = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=size))
        memories = stage_memory(arch, sized, num_gpus)
        return [m.activations_recomputed if config.train.recompute else m.activations for m in memories]

    most = held(source, base)

    def micro_batch_size(partition: Partition) -> int:
        arch = physical_architecture(partition)
        fitting = [
            size for size in sizes if all(here <= room for here, room in zip(held(arch, size), most, strict=True))
        ]
        return max(fitting, default=base)

    return micro_batch_size


def physical_architecture(partition: Partition) -> Architecture:
    """The widths that tensors have under a placement, dead padding included, those of all ranks added up.

    Of the K/V heads only the number means anything.
    """
    heads = int(partition.heads[0].size)
    counts = [min(int(slots.size), heads) for slots in partition.kv_heads]
    return dataclasses.replace(
        partition.source,
        hidden_size=len(partition.stem),
        ffn_hidden_size=int(partition.ffn[0].size),
        num_attention_heads=heads,
        kv_groups=tuple((heads - kv + 1, *(1,) * (kv - 1)) for kv in counts),
    )
