"""Which decoder layers a pipeline stage holds."""

from __future__ import annotations

from megatron_prune.errors import UserError


def stage_layers(num_layers: int, stages: int) -> tuple[range, ...]:
    """Decoder layers of every stage: as even as can be, and the first stages take one more where it does not divide.

    That is what DeepSpeed's ``partition_method="type:DecoderLayer"`` does.

    Raises:
        UserError: more stages than layers.
    """
    if stages > num_layers:
        raise UserError(f"--pipeline-model-parallel-size {stages} is above the {num_layers} layers: use at most that")
    least, extra = divmod(num_layers, stages)
    ends = [least * stage + min(stage, extra) for stage in range(stages + 1)]
    return tuple(range(start, end) for start, end in zip(ends, ends[1:], strict=False))
