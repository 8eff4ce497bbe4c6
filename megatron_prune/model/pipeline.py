"""The decoder as a DeepSpeed PipelineModule, and the names and sizes of what each stage holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import cast

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_prune.architecture import TensorSpec, tensor_specs
from megatron_prune.model.attention import LayerShape, RMSNorm
from megatron_prune.model.masks import ModelMasks
from megatron_prune.model.transformer import DecoderLayer, LMHead
from megatron_prune.ops.dispatch import Ops
from megatron_prune.parallel.distill_loss import Guide, linear_distillation
from megatron_prune.parallel.layers import TensorParallel
from megatron_prune.parallel.linear_loss import IGNORED, linear_cross_entropy
from megatron_prune.parallel.mesh import Mesh
from megatron_prune.parallel.partition import DEAD, Partition, is_split, live
from megatron_prune.parallel.vocab import VocabParallelEmbedding

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

    @property
    def is_stage_copy(self) -> bool:
        """True for the last stage's copy of a tied embedding: the first stage's is the one to save and to count."""
        return bool(getattr(self.parameter, "ds_pipe_replicated", False))

    def replace(self, value: Tensor) -> None:
        """Put a new parameter of another shape in its place, with the marks DeepSpeed's gradient norm goes by."""
        fresh = nn.Parameter(value)
        fresh.ds_pipe_replicated = self.is_stage_copy  # type: ignore[attr-defined]
        fresh.tensor_model_parallel = is_split(self.spec)  # type: ignore[attr-defined]
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


def build_pipeline(
    partition: Partition,
    ops: Ops,
    mesh: Mesh,
    *,
    sequence_parallel: bool,
    recompute: bool,
    compile_layers: bool,
    guide: Guide | None = None,
) -> PipelineModule:
    """Build this process's stage of the model.

    Args:
        partition: physical sizes, for as many tensor-parallel ranks as the mesh has.
        ops: kernels.
        mesh: the layout.
        sequence_parallel: split the sequence over the tensor-parallel ranks between blocks.
        recompute: checkpoint the activations of every decoder layer.
        compile_layers: run the decoder layers through torch.compile.
        guide: a teacher's output projection, on the last stage of a run that has one.

    Returns:
        A module whose loss is the mean cross-entropy of ``[B, S]`` next tokens. Beside them, in a pair, a run with a
        teacher takes its last hidden states ``[B, S, D]``, and the loss is that of
        :func:`~megatron_prune.parallel.distill_loss.linear_distillation`; a run without one takes a number, and the
        loss is the sum over the next tokens that are not ``IGNORED`` (some must not be) divided by that.
    """
    arch = partition.source
    shapes = layer_shapes(partition, mesh.tp_rank)
    hidden, live_hidden = shapes[0].hidden, shapes[0].live_hidden
    tp = TensorParallel(mesh.tp_rank, mesh.tp_size, mesh.tp_group, sequence_parallel)
    rows, first, valid = vocab_rows(partition, mesh.tp_rank)
    layers: list[LayerSpec] = [LayerSpec(DecoderLayer, arch, shape, ops, tp) for shape in shapes]
    last_norm = LayerSpec(RMSNorm, hidden, live_hidden, arch.norm_eps, ops)
    table = (rows, first, valid, hidden, tp)
    if arch.tie_embeddings:
        embed = TiedLayerSpec(TIED_KEY, VocabParallelEmbedding, *table)
        head: LayerSpec = TiedLayerSpec(TIED_KEY, VocabParallelEmbedding, *table, forward_fn=_enter_head)
    else:
        embed = LayerSpec(VocabParallelEmbedding, *table)
        head = LayerSpec(_UntiedHead, rows, hidden, tp)

    def loss(entered: Tensor, target: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        entered, weight = entered.flatten(0, -2), _head_weight(pipeline)
        if isinstance(target, Tensor):
            return mean_loss(entered, weight, target.flatten())
        labels, beside = target[0].flatten(), target[1]
        if guide is not None:
            return linear_distillation(entered, weight, labels, beside.flatten(0, -2), guide, first, valid, tp)
        counted = labels != IGNORED
        labels = labels[counted]  # the others need no logits at all
        return mean_loss(entered[counted], weight, labels) * (len(labels) / beside)

    def mean_loss(entered: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        if tp.size == 1:
            return ops.cross_entropy(entered, weight, labels)
        return linear_cross_entropy(entered, weight, labels, first, valid, tp)

    copies = mesh.world_size // (mesh.tp_size * mesh.pp_size)
    pipeline = PipelineModule(
        layers=[embed, *layers, last_norm, head],
        topology=PipeModelDataParallelTopology(num_pp=mesh.pp_size, num_mp=mesh.tp_size, num_dp=copies),
        loss_fn=loss,
        partition_method=f"type:{DecoderLayer.__name__}",
        activation_checkpoint_interval=1 if recompute else 0,
        checkpointable_layers=[DecoderLayer.__name__],
    )
    for layer in pipeline.modules():
        if compile_layers and isinstance(layer, DecoderLayer):
            layer.compile()
    return pipeline


def vocab_rows(partition: Partition, tp_rank: int) -> tuple[int, int, int]:
    """Rows of a rank's part of the vocabulary, its first token, and how many rows hold a token."""
    tokens = partition.slots("vocab", None, tp_rank)
    return len(tokens), tp_rank * len(tokens), int((tokens != DEAD).sum())


class _UntiedHead(LMHead):
    """The last layer of the pipeline: its product is formed together with the loss, which multiplies by the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self.tp.enter(x)


def _enter_head(embedding: VocabParallelEmbedding, x: Tensor) -> Tensor:
    return embedding.tp.enter(x)


def _head_weight(pipeline: PipelineModule) -> Tensor:
    """Weight of the output projection; compaction replaces it, so it is looked up each time."""
    tied = TIED_KEY in pipeline.tied_modules
    head = pipeline.tied_modules[TIED_KEY] if tied else pipeline.forward_funcs[-1]
    return cast(Tensor, head.weight)


def named_parameters(pipeline: PipelineModule, partition: Partition) -> list[NamedParameter]:
    """This stage's parameters in model order, each tied matrix once."""
    specs = {spec.name: spec for spec in tensor_specs(partition.source)}
    found = []
    for prefix, module in stage_modules(pipeline, partition):
        for local_name, _ in module.named_parameters():
            *path, attribute = local_name.split(".")
            found.append(NamedParameter(specs[prefix + local_name], module.get_submodule(".".join(path)), attribute))
    order = {name: position for position, name in enumerate(specs)}
    return sorted(found, key=lambda entry: order[entry.spec.name])


@torch.no_grad()
def follow_partition(pipeline: PipelineModule, partition: Partition, tp_rank: int) -> None:
    """Tell every module its sizes after the partition changed (logically or physically)."""
    shapes = layer_shapes(partition, tp_rank)
    for prefix, module in stage_modules(pipeline, partition):
        if isinstance(module, DecoderLayer):
            module.set_shape(shapes[int(prefix.split(".")[2])])
        elif isinstance(module, RMSNorm):
            module.live_width = shapes[0].live_hidden


def set_masks(pipeline: PipelineModule, partition: Partition, masks: ModelMasks) -> None:
    """Multiply by masks from now on, in an unsplit model that nothing was removed from."""
    for prefix, module in stage_modules(pipeline, partition):
        if isinstance(module, DecoderLayer):
            module.set_masks(masks, int(prefix.split(".")[2]))
        elif isinstance(module, RMSNorm):
            module.mask = masks.stem


def stage_modules(pipeline: PipelineModule, partition: Partition) -> Iterator[tuple[str, nn.Module]]:
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
