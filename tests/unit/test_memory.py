"""Memory per GPU against DeepSpeed's own split and schedule, the real placement, and hand arithmetic."""

from __future__ import annotations

import pytest
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule
from deepspeed.runtime.utils import partition_balanced

from megatron_prune.architecture import Architecture, tensor_specs
from megatron_prune.config import Config, parse_source_shape, shape_between
from megatron_prune.config.yaml_file import with_values
from megatron_prune.errors import UserError
from megatron_prune.memory import (
    Memory,
    copies_of_model,
    num_micro_batches,
    rank_shard,
    stage_memory,
    worst_stage,
)
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.stages import stage_layers

TINY = "hidden=6,ffn=7,heads=4,kv_heads=2,head_dim=2,layers=5,vocab=11,tied={tied}"
TOKENS = 3 * 8
#: Bytes that one of its layers keeps: norms 4 x 6, queries 3 x 8, KV 3 x 4, ffn 3 x 7, tables 2 x 2, statistics 4 + 2.
TINY_LAYER = TOKENS * (2 * (24 + 24 + 12 + 21 + 4) + 4 * 6)


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


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8])
@pytest.mark.parametrize("pipeline", [2, 3, 5])
def test_in_flight_is_deepspeeds_schedule(pipeline: int, micro_batches: int) -> None:
    config = _layout(pipeline=pipeline, global_batch_size=3 * micro_batches)
    stages = stage_memory(_tiny(), config, pipeline)
    cuts = stage_layers(5, pipeline)
    hidden, joined = TOKENS * 6 * 2, max(8 * 7, 2 * (8 + 2 * 4) + 4 * 8) * 6
    work = 2 * hidden + 2 * TOKENS * 2 * 7
    assert work > 2 * hidden + joined
    for stage, layers in enumerate(cuts[:-1]):  # the last one has the loss on top
        alive = most = 0
        for commands in TrainSchedule(micro_batches=micro_batches, stages=pipeline, stage_id=stage):
            alive += sum(isinstance(command, ForwardPass) for command in commands)
            most = max(most, alive)
            alive -= sum(isinstance(command, BackwardPass) for command in commands)
        buffers = hidden * (most * (1 + (stage > 0)) + 3)
        assert stages[stage].activations == most * len(layers) * TINY_LAYER + buffers + work
        recomputed = most * len(layers) * hidden + buffers + TINY_LAYER - hidden + work
        assert stages[stage].activations_recomputed == recomputed


def test_reduction_of_bf16_gradients() -> None:
    """What is below DeepSpeed's bucket is joined before, in fp32."""
    arch = _tiny()
    (small,), (fp32,) = stage_memory(arch, _config(), 1), stage_memory(arch, _config(precision="fp32"), 1)
    assert (small.reduction, fp32.reduction) == (4 * arch.num_parameters(), 0)
    assert small.total(recompute=True) == 20 * arch.num_parameters() + max(
        small.reduction, small.activations_recomputed
    )
    large = parse_source_shape("hidden=4096,ffn=11008,heads=32,head_dim=128,layers=4,vocab=32000")
    (memory,) = stage_memory(large, _config(), 1)
    assert memory.reduction == 0


def test_statistics_and_solving_by_hand() -> None:
    """Of the stage's layers (3 and 2) on the fullest of two ranks: 2 heads of 2, 4 FFN channels, 6 of the stem."""
    pruning = {"target_params": "1K", "second_order": True}
    first, last = stage_memory(_tiny(), _layout(2, 2, **pruning, prune_metric="obc"), 4)
    rows = (4 * 8 + 4 * 8) * 4  # a rank's rows of the products of 8 padded columns
    stem = 6 * 6 * 4
    assert [first.statistics, last.statistics] == [3 * (rows + 2 * stem), 2 * (rows + 2 * stem) + stem]
    assert first.solving == last.solving == (4 + 4 * 8) * 8**2 + (4 + 2 * 8) * 6 * 8
    assert first.total(recompute=True) == (
        first.weights + first.gradients + first.masters + first.moments + first.statistics
    ) + max(first.activations_recomputed, first.reduction, first.solving)
    tied = stage_memory(_tiny(tied=1), _layout(2, 2, **pruning), 4)[1]
    assert tied.statistics == 2 * (rows + 2 * stem), "a tied head is not updated"


@pytest.mark.parametrize(("precision", "element_bytes"), [("bf16", 2 + 4), ("fp32", 4)])
def test_the_embeddings_gradient_comes_whole(precision: str, element_bytes: int) -> None:
    """In bf16 with its copy in fp32 for the sum; then the gradient of the hidden state and four in buffers."""
    wide = parse_source_shape("hidden=64,ffn=8,heads=2,head_dim=4,layers=2,vocab=100000")
    first, _ = stage_memory(wide, _layout(pipeline=2, global_batch_size=3, precision=precision), 2)
    hidden = TOKENS * 64 * (4 if precision == "fp32" else 2)
    assert first.activations == element_bytes * 64 * 100000 + 5 * hidden


def test_the_worst_stage_depends_on_what_is_counted() -> None:
    def memory(stage: int, kept: int, recomputed: int, compaction: int) -> Memory:
        return Memory(
            *(0, 0, 0, 0),
            activations=kept,
            activations_recomputed=recomputed,
            reduction=2,
            stage=stage,
            compaction=compaction,
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


@pytest.mark.parametrize("tied", [0, 1])
def test_a_teacher_is_a_second_model_without_states(tied: int) -> None:
    arch = _tiny(tied)
    plain, taught = (stage_memory(arch, _config(distill_weight=share), 1)[0] for share in (0.0, 0.5))
    hidden = TOKENS * arch.hidden_size
    assert plain.teacher == 0
    assert taught.teacher == plain.weights + 2 * hidden
    assert taught.total(recompute=True) == plain.total(recompute=True) + taught.teacher
    assert taught.peak(recompute=True, compacts=True) == plain.peak(recompute=True, compacts=True) + taught.teacher


def test_a_teacher_is_split_as_the_model_is_and_keeps_its_size() -> None:
    arch = _tiny()
    config = _layout(2, 2, distill_weight=0.5)
    stages = stage_memory(arch, config, 4)
    kept = 2 * TOKENS * arch.hidden_size * num_micro_batches(config, 1)
    assert [memory.teacher for memory in stages] == [stages[0].weights, stages[1].weights + kept]
    smaller = stage_memory(shape_between(arch, 3, 4, 2), config, 4, arch)
    assert [memory.teacher for memory in smaller] == [memory.teacher for memory in stages]
