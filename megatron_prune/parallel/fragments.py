"""Which piece of every tensor the optimizer of a rank owns under a layout, without a process group."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from megatron_prune.architecture import TensorSpec, tensor_specs
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.stages import stage_layers

#: Elements per copy to which DeepSpeed pads the flat buffer of a parameter group (``nccl_start_alignment_factor``).
_ALIGNMENT = 2


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the processes of a run share the model.

    Attributes:
        tensor: tensor-parallel ranks.
        pipeline: stages.
        data: copies of the model, over which ZeRO-1 divides the optimizer.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def processes(self) -> int:
        """World size."""
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        return f"TP{self.tensor} PP{self.pipeline} DP{self.data}"


@dataclasses.dataclass(frozen=True)
class Place:
    """A contiguous piece of a tensor-parallel rank's flattened physical tensor, owned by one rank.

    Attributes:
        rank: global rank, ``(pp * DP + dp) * TP + tp``.
        tp_rank: its tensor-parallel rank.
        spec: the tensor.
        start: first element.
        numel: elements.
    """

    rank: int
    tp_rank: int
    spec: TensorSpec
    start: int
    numel: int


def fragment_places(partition: Partition, layout: Layout) -> Iterator[Place]:
    """Every piece that is saved under a layout, stage by stage, each rank's in model order within its group.

    As ZeRO-1 divides it: the optimizer has a group of matrices and one of vectors; a group's tensors lie one after
    the other in a flat buffer, which is cut into equal runs, one per copy. The last stage's copy of a tied embedding
    takes its place there and is not saved.

    Args:
        partition: placement of the units, made for ``layout.tensor`` ranks.
        layout: sizes.

    Raises:
        UserError: more stages than layers.
    """
    assert partition.tensor_parallel == layout.tensor, (partition.tensor_parallel, layout)
    for stage, specs in enumerate(_stage_specs(partition, layout.pipeline)):
        for matrices in (True, False):
            group = [spec for spec in specs if (len(spec.axes) > 1) is matrices]
            sizes = [math.prod(partition.shape(spec)) for spec in group]
            unit = _ALIGNMENT * layout.data
            share = -(-sum(sizes) // unit) * unit // layout.data
            begin = 0
            for position, (spec, size) in enumerate(zip(group, sizes, strict=True)):
                tied_copy = stage > 0 and position == 0 and spec.name == "model.embed_tokens.weight"
                if not tied_copy:
                    yield from _pieces(spec, begin, size, share, stage, layout)
                begin += size


def _pieces(spec: TensorSpec, begin: int, size: int, share: int, stage: int, layout: Layout) -> Iterator[Place]:
    """Cut a tensor at ``[begin, begin + size)`` of a flat buffer along the copies' shares."""
    for copy in range(begin // share, -(-(begin + size) // share)):
        low, high = max(begin, copy * share), min(begin + size, (copy + 1) * share)
        for tp_rank in range(layout.tensor):
            rank = (stage * layout.data + copy) * layout.tensor + tp_rank
            yield Place(rank, tp_rank, spec, low - begin, high - low)


def _stage_specs(partition: Partition, stages: int) -> list[list[TensorSpec]]:
    """Tensors of every stage in model order, the last stage's copy of a tied embedding included."""
    source = partition.source
    layers = stage_layers(source.num_layers, stages)
    stage_of_layer = {layer: stage for stage, held in enumerate(layers) for layer in held}
    found: list[list[TensorSpec]] = [[] for _ in layers]
    for spec in tensor_specs(source):
        if spec.layer is not None:
            found[stage_of_layer[spec.layer]].append(spec)
        elif spec.name == "model.embed_tokens.weight":
            found[0].append(spec)
            if source.tie_embeddings and stages > 1:
                found[-1].append(spec)
        else:
            found[-1].append(spec)
    return found
