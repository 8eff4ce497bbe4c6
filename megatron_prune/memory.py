"""Memory of one GPU under a layout, by arithmetic alone.

The fullest process of a layout is what has to fit, so everything is counted for it: the widest tensor-parallel shard
(:func:`rank_shard`), on every pipeline stage (:func:`stage_memory`). Work space of kernels, NCCL's buffers and the
allocator's fragmentation are not counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from megatron_prune.activations import FP32_BYTES, Stage, activation_bytes
from megatron_prune.architecture import Architecture, TensorSpec, tensor_specs
from megatron_prune.config import Config
from megatron_prune.errors import UserError
from megatron_prune.parallel.stages import stage_layers

GIB = 2**30

_BF16_BYTES = 2
_FP64_BYTES = 8
#: DeepSpeed reduces so many fp32 gradients in place, and joins what is smaller into a new tensor.
_BUCKET_ELEMENTS = 500_000_000


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        weights: parameters in the precision of the forward pass.
        gradients: the gradients, and in bf16 DeepSpeed's unsharded fp32 sums, in fp32 a share of the average.
        masters: fp32 masters, divided over the copies of the model (ZeRO-1).
        moments: both Adam moments in fp32, divided over the copies of the model.
        activations: what the passes hold and work with, see :func:`~megatron_prune.activations.activation_bytes`.
        activations_recomputed: the same with ``--recompute``.
        reduction: what summing the gradients over the copies works with, when there are no activations.
        stage: the pipeline stage that the GPU works on.
        compaction: everything that lies there while tensors are cut, when there are no activations: weights and
            gradients, masters and moments twice (old and new, both counted at the old size), and one whole unsharded
            parameter in fp32.
        statistics: what a step that prunes collects beside its gradient, see :func:`_statistics_bytes`.
        solving: what ``obc`` and ``--second-order`` work with after the passes, one matrix at a time.
        teacher: weights of the frozen source under ``--distill-weight``, and the hidden states it leaves for the loss.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    activations: int
    activations_recomputed: int
    reduction: int
    stage: int
    compaction: int
    statistics: int = 0
    solving: int = 0
    teacher: int = 0

    def working(self, recompute: bool) -> int:
        """What training holds beside the model: the activations of one choice, or what follows them: the reduction, or
        the solving of a step that prunes."""
        return max(self.activations_recomputed if recompute else self.activations, self.reduction, self.solving)

    def total(self, recompute: bool) -> int:
        """The most that training holds, with the activations of one choice."""
        model = self.weights + self.gradients + self.masters + self.moments
        return model + self.statistics + self.teacher + self.working(recompute)

    def peak(self, recompute: bool, compacts: bool) -> int:
        """The most that is ever held: training, or a compaction where the run has any."""
        return max(self.total(recompute), self.compaction + self.teacher if compacts else 0)


def compacts(config: Config) -> bool:
    """True when the run cuts tensors physically."""
    return config.prune.active and config.prune.prune_align > 0


def worst_stage(stages: Iterable[Memory], recompute: bool, compacting: bool = False) -> Memory:
    """The stage that holds most, the first of equals."""
    return max(stages, key=lambda memory: memory.peak(recompute, compacting))


def copies_of_model(config: Config, num_gpus: int) -> int:
    """Data parallel size: ``num_gpus / (TP * PP)``.

    Raises:
        UserError: a size below one, or sizes whose product does not divide the GPUs.
    """
    tensor, pipeline = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    sizes = f"--tensor-model-parallel-size {tensor} x --pipeline-model-parallel-size {pipeline}"
    if min(tensor, pipeline) < 1:
        raise UserError(f"{sizes}: both must be 1 or more")
    if num_gpus % (tensor * pipeline):
        raise UserError(
            f"{sizes} = {tensor * pipeline} does not divide {num_gpus} GPU(s): change one of them, or plan for a "
            f"multiple of {tensor * pipeline}"
        )
    return config.parallel.data_parallel_size(num_gpus)


def num_micro_batches(config: Config, copies: int) -> int:
    """Micro-batches that each copy works through in a step: ``global batch / (micro-batch * DP)``, rounded up."""
    return max(1, math.ceil(config.train.global_batch_size / (config.train.micro_batch_size * copies)))


def rank_shard(arch: Architecture, tensor_parallel: int) -> Architecture:
    """Shape of the fullest tensor-parallel rank's share, padding included, as an Architecture of its own.

    Query heads are dealt in contiguous runs, so every rank has places for ``ceil(heads / TP)``; a KV head whose
    queries lie on several ranks is held by each of them, and every rank has places for as many as the fullest one.
    FFN channels and vocabulary are ``ceil(n / TP)``; the stem (norms included) is whole on every rank. Only the number
    of KV heads means anything in the ``kv_groups`` of the result.
    """
    heads = math.ceil(arch.num_attention_heads / tensor_parallel)
    least, extra = divmod(arch.num_attention_heads, tensor_parallel)
    ends = [least * rank + min(rank, extra) for rank in range(tensor_parallel + 1)]
    groups = []
    for layer in range(arch.num_layers):
        kv_of_head = arch.kv_of_head(layer)
        kv = max(len(set(kv_of_head[start:end])) for start, end in zip(ends, ends[1:], strict=False))
        groups.append((heads - kv + 1, *(1,) * (kv - 1)))
    return dataclasses.replace(
        arch,
        num_attention_heads=heads,
        kv_groups=tuple(groups),
        ffn_hidden_size=math.ceil(arch.ffn_hidden_size / tensor_parallel),
        vocab_size=math.ceil(arch.vocab_size / tensor_parallel),
    )


def stage_memory(
    arch: Architecture, config: Config, num_gpus: int, source: Architecture | None = None
) -> tuple[Memory, ...]:
    """Bytes on the fullest GPU of every pipeline stage at a shape.

    With P parameters on a stage's rank (a tied embedding lies on the first and on the last stage) and DP copies:
    weights ``2P`` in bf16 or ``4P`` in fp32; gradients ``2P + 4P`` or ``4P + 4P/DP``; masters ``4P/DP``; moments
    ``8P/DP``. DeepSpeed joins a small model's bf16 gradients, decayed and not, to sum them over the copies: ``4P``
    where P is at most 500 M. Under 1F1B stage ``s`` of PP keeps the activations of ``min(PP - s, micro-batches)``
    micro-batches. Dead padding that waits for a compaction (up to ``--prune-align`` channels a rank) is not known in
    advance and not counted.

    Args:
        arch: shape of the model.
        config: settings.
        num_gpus: all processes.
        source: what a teacher is, where it is not ``arch``.

    Raises:
        UserError: the layout does not divide the GPUs, or has more stages than layers.
    """
    copies = copies_of_model(config, num_gpus)
    parallel = config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    shard, cuts = rank_shard(arch, tensor), stage_layers(arch.num_layers, stages)
    result = []
    for stage, layers in enumerate(cuts):
        specs = _stage_tensors(arch, layers, first=stage == 0, last=stage == stages - 1)
        parameters = sum(math.prod(shard.tensor_shape(spec)) for spec in specs)
        largest = max(math.prod(arch.tensor_shape(spec)) for spec in specs)
        work = _stage(shard, layers, config, stage, num_micro_batches(config, copies))
        work = dataclasses.replace(work, dead_heads=arch.num_attention_heads % tensor != 0)
        kept, recomputed = (activation_bytes(work, recompute) for recompute in (False, True))
        memory = _memory(config, stage, parameters, copies, largest, kept, recomputed)
        if config.prune.active:
            measured = _statistics_bytes(arch, shard, config, layers, last=stage == stages - 1)
            memory = dataclasses.replace(memory, statistics=measured, solving=_solving_bytes(arch, config))
        if config.distill.distill_weight:
            taught = _teacher_bytes(source or arch, config, stage, num_micro_batches(config, copies))
            memory = dataclasses.replace(memory, teacher=taught)
        result.append(memory)
    return tuple(result)


def _multiplied(config: Config) -> set[str]:
    """The axes of the inputs of which a step that prunes sums ``X X^T``."""
    prune = config.prune
    axes = {"heads" if axis == "attention" else axis for axis in prune.prune_axes} if prune.second_order else set()
    return axes | ({"heads", "ffn"} if prune.prune_metric == "obc" else set())


def _statistics_bytes(arch: Architecture, shard: Architecture, config: Config, layers: range, *, last: bool) -> int:
    """What is collected while the passes of a step that prunes run, on one stage's fullest rank.

    Fisher diagonals of ``o_proj`` and ``down_proj`` in fp32, not divided over the copies; Wanda's sums in fp64. X X^T
    in fp32: of heads and FFN the rank's rows, of the stem the whole of both of a layer's and of an untied head's.
    """
    hidden, heads, ffn = arch.hidden_size, shard.num_attention_heads * shard.head_dim, shard.ffn_hidden_size
    tensor, axes = config.parallel.tensor_model_parallel_size, _multiplied(config)
    metric, size = config.prune.prune_metric, 0
    if metric in ("taylor-mixed", "diag-hessian") and config.prune.prune_hessian == "fisher":
        size += FP32_BYTES * hidden * (heads + ffn)
    if metric == "wanda":
        size += _FP64_BYTES * (heads + ffn)
    products = {"heads": tensor * heads**2, "ffn": tensor * ffn**2, "stem": 2 * hidden**2}
    size += FP32_BYTES * sum(products[axis] for axis in axes)
    head = FP32_BYTES * hidden**2 if last and "stem" in axes and not arch.tie_embeddings else 0
    return len(layers) * size + head


def _solving_bytes(arch: Architecture, config: Config) -> int:
    """The widest X X^T whole, in fp32 and four times in fp64, and for ``obc`` a matrix in fp32 and twice in fp64."""
    widths = {
        "heads": arch.num_attention_heads * arch.head_dim,
        "ffn": arch.ffn_hidden_size,
        "stem": arch.hidden_size,
    }
    widest = max((widths[axis] for axis in _multiplied(config)), default=0)
    matrix = (FP32_BYTES + 2 * _FP64_BYTES) * arch.hidden_size * widest if config.prune.prune_metric == "obc" else 0
    return (FP32_BYTES + 4 * _FP64_BYTES) * widest**2 + matrix


def _teacher_bytes(source: Architecture, config: Config, stage: int, micro_batches: int) -> int:
    """A teacher's weights on one stage, split as the model's are, and what the last stage keeps of its passes.

    That is the last hidden states of a micro-batch, or of all those of a step where there are several stages, as the
    teacher runs ahead there. Its passes work before the model's, with less.
    """
    stages = config.parallel.pipeline_model_parallel_size
    shard, last = rank_shard(source, config.parallel.tensor_model_parallel_size), stage == stages - 1
    layers = stage_layers(source.num_layers, stages)[stage]
    specs = _stage_tensors(source, layers, first=stage == 0, last=last)
    elements = sum(math.prod(shard.tensor_shape(spec)) for spec in specs)
    if last:
        tokens = config.train.micro_batch_size * config.data.seq_length * (1 if stages == 1 else micro_batches)
        elements += tokens * source.hidden_size
    return _element_bytes(config) * elements


def _memory(
    config: Config, stage: int, parameters: int, copies: int, largest: int, kept: int, recomputed: int
) -> Memory:
    """The bytes of one stage from its parameters per rank and its activations."""
    bf16 = config.train.precision == "bf16"
    element = _element_bytes(config)
    share = math.ceil(parameters / copies)
    weights = element * parameters
    gradients = element * parameters + FP32_BYTES * (parameters if bf16 else share)
    masters, moments = FP32_BYTES * share, 2 * FP32_BYTES * share
    joined = bf16 and parameters <= _BUCKET_ELEMENTS
    return Memory(
        weights=weights,
        gradients=gradients,
        masters=masters,
        moments=moments,
        activations=kept,
        activations_recomputed=recomputed,
        reduction=FP32_BYTES * parameters if joined else 0,
        stage=stage,
        compaction=weights + gradients + 2 * (masters + moments) + FP32_BYTES * largest,
    )


def _stage(shard: Architecture, layers: range, config: Config, stage: int, micro_batches: int) -> Stage:
    micro, seq, parallel = config.train.micro_batch_size, config.data.seq_length, config.parallel
    stages = parallel.pipeline_model_parallel_size
    stem_seq = math.ceil(seq / parallel.tensor_model_parallel_size) if parallel.sequence_parallel else seq
    return Stage(
        shard,
        layers,
        first=stage == 0,
        last=stage == stages - 1,
        in_flight=min(stages - stage, micro_batches),
        tokens=micro * seq,
        stem_tokens=micro * stem_seq,
        element_bytes=_element_bytes(config),
    )


def _element_bytes(config: Config) -> int:
    return _BF16_BYTES if config.train.precision == "bf16" else FP32_BYTES


def _stage_tensors(arch: Architecture, layers: range, *, first: bool, last: bool) -> list[TensorSpec]:
    """The parameters of one stage: its layers, the embedding on the first, the last norm and the head on the last."""

    def is_here(spec: TensorSpec) -> bool:
        if spec.layer is not None:
            return spec.layer in layers
        if spec.name == "model.embed_tokens.weight":
            return first or (last and arch.tie_embeddings)
        return last

    return [spec for spec in tensor_specs(arch) if is_here(spec)]
