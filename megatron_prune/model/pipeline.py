"""The decoder as a DeepSpeed PipelineModule, and the names and sizes of what each stage holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import cast

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.nn import functional

from megatron_prune.architecture import TensorSpec, tensor_specs
from megatron_prune.model.attention import LayerShape, RMSNorm
from megatron_prune.model.transformer import DecoderLayer, Embedding, LMHead
from megatron_prune.ops.dispatch import Ops
from megatron_prune.parallel.partition import Partition, live

TIED_KEY = "embed_tokens"


@dataclasses.dataclass(frozen=True)
class NamedParameter:
    """A parameter of this stage.

    Attributes:
        spec: its logical tensor.
        module: the module that owns it.
        attribute: its attribute there.
    """

    spec: TensorSpec
    module: nn.Module
    attribute: str

    @property
    def parameter(self) -> nn.Parameter:
        """The live nn.Parameter; compaction replaces it, so it is looked up each time."""
        return cast(nn.Parameter, getattr(self.module, self.attribute))

    def replace(self, value: Tensor) -> None:
        """Put a new parameter of another shape in its place, carrying DeepSpeed's replication mark over."""
        fresh = nn.Parameter(value)
        fresh.ds_pipe_replicated = getattr(self.parameter, "ds_pipe_replicated", False)  # type: ignore[attr-defined]
        setattr(self.module, self.attribute, fresh)


def layer_shapes(partition: Partition, tp_rank: int = 0) -> tuple[LayerShape, ...]:
    """Physical sizes of every decoder layer under a partition."""
    return tuple(
        LayerShape(
            hidden=len(partition.stem),
            live_hidden=len(live(partition.stem)),
            ffn=len(partition.ffn[layer][tp_rank]),
            heads=len(partition.heads[layer][tp_rank]),
            kv_heads=len(partition.kv_heads[layer][tp_rank]),
            kv_of_head=partition.kv_slot_of_head(layer, tp_rank),
        )
        for layer in range(partition.source.num_layers)
    )


def build_pipeline(partition: Partition, ops: Ops, data_parallel: int, recompute: bool) -> PipelineModule:
    """Build this process's stage of the model.

    Args:
        partition: physical sizes.
        ops: kernels.
        data_parallel: number of copies.
        recompute: checkpoint the activations of every decoder layer.

    Returns:
        A module whose loss is the mean cross-entropy of ``[B, S]`` next tokens.
    """
    arch = partition.source
    shapes = layer_shapes(partition)
    hidden, live_hidden = shapes[0].hidden, shapes[0].live_hidden
    layers: list[LayerSpec] = [LayerSpec(DecoderLayer, arch, shape, ops) for shape in shapes]
    last_norm = LayerSpec(RMSNorm, hidden, live_hidden, arch.norm_eps, ops)
    if arch.tie_embeddings:
        embed = TiedLayerSpec(TIED_KEY, Embedding, arch.vocab_size, hidden)
        head: LayerSpec = TiedLayerSpec(TIED_KEY, Embedding, arch.vocab_size, hidden, forward_fn=_tied_logits)
    else:
        embed = LayerSpec(Embedding, arch.vocab_size, hidden)
        head = LayerSpec(LMHead, arch.vocab_size, hidden)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return ops.cross_entropy(logits.flatten(0, -2), labels.flatten())

    return PipelineModule(
        layers=[embed, *layers, last_norm, head],
        topology=PipeModelDataParallelTopology(num_pp=1, num_mp=1, num_dp=data_parallel),
        loss_fn=loss,
        partition_method="uniform",
        activation_checkpoint_interval=1 if recompute else 0,
        checkpointable_layers=[DecoderLayer.__name__],
    )


def named_parameters(pipeline: PipelineModule, partition: Partition) -> list[NamedParameter]:
    """This stage's parameters in model order, each tied matrix once."""
    specs = {spec.name: spec for spec in tensor_specs(partition.source)}
    found = []
    for prefix, module in _stage_modules(pipeline, partition):
        for local_name, _ in module.named_parameters():
            *path, attribute = local_name.split(".")
            found.append(NamedParameter(specs[prefix + local_name], module.get_submodule(".".join(path)), attribute))
    order = {name: position for position, name in enumerate(specs)}
    return sorted(found, key=lambda entry: order[entry.spec.name])


@torch.no_grad()
def follow_partition(pipeline: PipelineModule, partition: Partition) -> None:
    """Tell every module its sizes after the partition changed (logically or physically)."""
    shapes = layer_shapes(partition)
    for prefix, module in _stage_modules(pipeline, partition):
        if isinstance(module, DecoderLayer):
            module.set_shape(shapes[int(prefix.split(".")[2])])
        elif isinstance(module, RMSNorm):
            module.live_width = shapes[0].live_hidden


def _stage_modules(pipeline: PipelineModule, partition: Partition) -> Iterator[tuple[str, nn.Module]]:
    """``(Hugging Face prefix, module)`` of everything this stage holds."""
    last_norm = partition.source.num_layers + 1
    for key, module in pipeline.tied_modules.items():
        yield f"model.{key}.", module
    for position in range(pipeline._local_start, pipeline._local_stop):
        if position in (0, last_norm + 1) and partition.source.tie_embeddings:
            continue
        module = pipeline.get_submodule(str(position))
        if position == 0:
            yield "model.embed_tokens.", module
        elif position < last_norm:
            yield f"model.layers.{position - 1}.", module
        else:
            yield ("model.norm." if position == last_norm else "lm_head."), module


def _tied_logits(embedding: Embedding, x: Tensor) -> Tensor:
    return functional.linear(x, embedding.weight)
