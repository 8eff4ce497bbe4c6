"""Memory per GPU against DeepSpeed's own split and schedule, the real placement, and hand arithmetic."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule
from deepspeed.runtime.utils import partition_balanced

from megatron_prune.architecture import Architecture, tensor_specs
from megatron_prune.config import Config, parse_source_shape, shape_between
from megatron_prune.config.yaml_file import with_values
from megatron_prune.errors import UserError
from megatron_prune.memory import (
    Memory,
    activation_bytes,
    copies_of_model,
    num_micro_batches,
    rank_shard,
    stage_layers,
    stage_memory,
    worst_stage,
)
from megatron_prune.model.attention import logical_shapes
from megatron_prune.model.transformer import DecoderLayer
from megatron_prune.ops.dispatch import build_ops
from megatron_prune.parallel.layers import TensorParallel
from megatron_prune.parallel.partition import Partition

TINY = "hidden=6,ffn=7,heads=4,kv_heads=2,head_dim=2,layers=5,vocab=11,tied={tied}"
#: Elements per token that one of its layers keeps: norms 4 x 6, queries 2 x 8, KV 2 x 4, ffn 4 x 7.
TINY_LAYER = 76


def _config(**values: object) -> Config:
    defaults = {"seq_length": 8, "micro_batch_size": 3, "global_batch_size": 24, "precision": "bf16"}
    return with_values(Config(), defaults | values)


def _layout(tensor: int = 1, pipeline: int = 1, **values: object) -> Config:
    return _config(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, **values)


def _tiny(tied: int = 0) -> Architecture:
    return parse_source_shape(TINY.format(tied=tied))


@pytest.mark.parametrize("num_layers", [1, 5, 7, 24, 28, 32])
def test_stages_are_deepspeeds(num_layers: int) -> None:
    for stages in range(1, min(num_layers, 8) + 1):
        weights = [0, *(1 for _ in range(num_layers)), 0, 0]  # embedding, decoder layers, last norm, head
        bounds = [int(bound) for bound in partition_balanced(weights, stages)]
        theirs = [sum(weights[low:high]) for low, high in zip(bounds, bounds[1:], strict=False)]
        ours = stage_layers(num_layers, stages)
        assert [len(layers) for layers in ours] == theirs
        assert [layer for layers in ours for layer in layers] == list(range(num_layers))


@pytest.mark.parametrize("tensor", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    "source",
    [
        "hidden=6,ffn=7,heads=7,kv_heads=7,head_dim=2,layers=2,vocab=11,tied=1",
        "hidden=6,ffn=9,heads=5,kv_heads=1,head_dim=2,layers=2,vocab=7,qkv_bias=1",
        "hidden=6,ffn=16,heads=28,kv_heads=4,head_dim=2,layers=2,vocab=16,qk_norm=1",
        "hidden=6,ffn=16,heads=2,kv_heads=2,head_dim=2,layers=2,vocab=16",
    ],
)
def test_shards_are_the_partitions(source: str, tensor: int) -> None:
    arch = parse_source_shape(source)
    narrower = shape_between(arch, 5, 5, max(1, arch.num_attention_heads - 1))  # layers may differ in KV heads
    for shape in (arch, narrower):
        partition, shard = Partition.of(shape, tensor), rank_shard(shape, tensor)
        for spec in tensor_specs(shape):
            assert shard.tensor_shape(spec) == partition.shape(spec), spec.name


@pytest.mark.parametrize("tied", [0, 1])
@pytest.mark.parametrize("pipeline", [1, 2, 5])
def test_stages_hold_the_model_once_and_a_tied_embedding_twice(tied: int, pipeline: int) -> None:
    arch = _tiny(tied)
    stages = stage_memory(arch, _layout(pipeline=pipeline), pipeline)
    copy = arch.vocab_size * arch.hidden_size if tied and pipeline > 1 else 0
    assert sum(memory.weights for memory in stages) == 2 * (arch.num_parameters() + copy)
    assert [memory.stage for memory in stages] == list(range(pipeline))


def test_tensor_ranks_hold_the_model_once_and_norms_each() -> None:
    arch = _tiny()
    (memory,) = stage_memory(shape_between(arch, 6, 6, 4), _layout(tensor=2), 2)
    whole = shape_between(arch, 6, 6, 4).num_parameters()
    norms, padding = 6 * (2 * arch.num_layers + 1), 2 * 6  # a twelfth row in the embedding and in the head
    assert 2 * memory.weights == 2 * (whole + norms + padding)


def test_states_by_hand() -> None:
    arch = _tiny()
    parameters = arch.num_parameters()
    (bf16,) = stage_memory(arch, _config(), 4)
    share = -(-parameters // 4)
    assert (bf16.weights, bf16.gradients) == (2 * parameters, 6 * parameters)
    assert (bf16.masters, bf16.moments) == (4 * share, 8 * share)
    (fp32,) = stage_memory(arch, _config(precision="fp32"), 4)
    assert (fp32.weights, fp32.gradients) == (4 * parameters, 4 * parameters + 4 * share)


def test_compaction_by_hand() -> None:
    arch = _tiny()
    memory = stage_memory(arch, _layout(tensor=2), 4)[0]
    largest = arch.vocab_size * arch.hidden_size  # whole, whatever the shards
    states = 2 * (memory.masters + memory.moments)
    assert memory.compaction == memory.weights + memory.gradients + states + 4 * largest


def test_activations_by_hand() -> None:
    arch, tokens, head = _tiny(), 24, 11 * (2 + 8)
    (memory,) = stage_memory(arch, _config(), 1)
    assert memory.activations == tokens * (2 * 5 * TINY_LAYER + head)
    assert memory.activations_recomputed == tokens * (2 * (5 * 6 + TINY_LAYER) + head)


def test_activations_of_a_rank_by_hand() -> None:
    arch, tokens, head = _tiny(), 24, 6 * (2 + 8)
    layer = 4 * 6 + (2 * 8 + 2 * 4) // 2 + 4 * 4
    (plain,) = stage_memory(arch, _layout(tensor=2), 2)
    assert plain.activations == tokens * (2 * 5 * layer + head)
    (parallel,) = stage_memory(arch, _layout(tensor=2, sequence_parallel=True), 2)
    assert parallel.activations == tokens * (2 * 5 * (layer - 6) + head)  # half of the two norms' inputs
    assert parallel.activations_recomputed == tokens * (2 * (5 * 6 // 2 + layer - 6) + head)


@pytest.mark.parametrize("shape", ["ffn=1024,heads=8,kv_heads=8", "ffn=700,heads=8,kv_heads=2"])
def test_activations_are_near_what_a_layer_keeps(shape: str) -> None:
    arch = parse_source_shape(f"hidden=256,{shape},head_dim=32,layers=1,vocab=8")
    layer = DecoderLayer(arch, logical_shapes(arch)[0], build_ops({}, torch.device("cpu")), TensorParallel()).bfloat16()
    kept: dict[int, torch.Tensor] = {}  # alive until counted, or two tensors might share an address

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(2, 128, 256, dtype=torch.bfloat16, requires_grad=True))
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    measured = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    sizes = {"tokens": 256, "stem_tokens": 256, "in_flight": 1, "element_bytes": 2}
    estimate = activation_bytes(arch, range(1), **sizes, with_head=False, recompute=False)
    assert 0.85 < measured / estimate < 1.15  # kernels differ in what they keep, see the docstring


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8])
@pytest.mark.parametrize("pipeline", [2, 3, 5])
def test_in_flight_is_deepspeeds_schedule(pipeline: int, micro_batches: int) -> None:
    config = _layout(pipeline=pipeline, global_batch_size=3 * micro_batches)
    stages = stage_memory(_tiny(), config, pipeline)
    cuts = stage_layers(5, pipeline)
    for stage, layers in enumerate(cuts[:-1]):  # the last one has the logits on top
        alive = most = 0
        for commands in TrainSchedule(micro_batches=micro_batches, stages=pipeline, stage_id=stage):
            alive += sum(isinstance(command, ForwardPass) for command in commands)
            most = max(most, alive)
            alive -= sum(isinstance(command, BackwardPass) for command in commands)
        assert stages[stage].activations == most * len(layers) * 24 * 2 * TINY_LAYER
        assert stages[stage].activations_recomputed == 24 * 2 * (most * len(layers) * 6 + TINY_LAYER)


def test_the_worst_stage_depends_on_what_is_counted() -> None:
    def memory(stage: int, kept: int, recomputed: int, compaction: int) -> Memory:
        return Memory(
            0, 0, 0, 0, activations=kept, activations_recomputed=recomputed, stage=stage, compaction=compaction
        )

    stages = (memory(0, 9, 1, 0), memory(1, 3, 3, 0), memory(2, 0, 0, 10))
    assert worst_stage(stages, recompute=False).stage == 0
    assert worst_stage(stages, recompute=True).stage == 1
    assert worst_stage(stages, recompute=False, compacting=True).stage == 2


def test_copies_and_micro_batches() -> None:
    config = _layout(tensor=2, pipeline=3)
    assert copies_of_model(config, 12) == 2
    assert num_micro_batches(config, 2) == 4
    assert num_micro_batches(config, 16) == 1
    with pytest.raises(UserError, match=r"2 x --pipeline-model-parallel-size 3 = 6 does not divide 8 GPU"):
        stage_memory(_tiny(), config, 8)
    with pytest.raises(UserError, match="must be 1 or more"):
        stage_memory(_tiny(), _layout(tensor=0), 8)
    with pytest.raises(UserError, match="is above the 5 layers"):
        stage_memory(_tiny(), _layout(pipeline=6), 6)
