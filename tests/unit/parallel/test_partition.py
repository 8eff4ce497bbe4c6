"""Slots, liveness and compaction, over random removals."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from megatron_prune.architecture import Architecture, tensor_specs, uniform_kv_groups
from megatron_prune.parallel.partition import DEAD, Partition, live
from megatron_prune.pruning.groups import GROUP_TYPES, MiniGroup, remove, units

ARCH = Architecture(
    family="llama",
    num_layers=3,
    hidden_size=20,
    ffn_hidden_size=28,
    num_attention_heads=6,
    kv_groups=uniform_kv_groups(3, 6, 3),
    head_dim=4,
    vocab_size=11,
)


@st.composite
def pruned_partitions(draw: st.DrawFn) -> Partition:
    partition = Partition.of(ARCH)
    for kind in draw(st.lists(st.sampled_from(["attention", "ffn", "stem"]), max_size=15)):
        layers = {"attention": partition.heads, "ffn": partition.ffn}.get(kind, ())
        arrays = [live(array) for array in layers] or [live(partition.stem)]
        if len(arrays[0]) == 1:
            continue
        chosen = [int(draw(st.sampled_from(array.tolist()))) for array in arrays]
        group = MiniGroup("stem", chosen[0]) if kind == "stem" else MiniGroup(kind, tuple(chosen))  # type: ignore[arg-type]
        partition = remove(partition, group)
    return partition


@given(pruned_partitions(), st.sampled_from([1, 4, 8, 64]))
@settings(max_examples=60, deadline=None)
def test_compaction_keeps_live_units_and_aligns_widths(partition: Partition, quantum: int) -> None:
    small = partition.compacted(quantum)
    assert small.architecture() == partition.architecture()
    for old, new in ((partition.stem, small.stem), *zip(partition.ffn, small.ffn, strict=True)):
        np.testing.assert_array_equal(live(old), live(new))
        assert new.size <= old.size
        assert new.size == old.size or new.size % quantum == 0
        assert new.size - len(live(new)) < quantum or new.size == old.size
    assert not any((heads == DEAD).any() for heads in small.heads)
    assert not small.compaction_due(quantum), "compacting twice gains nothing"
    changed = [spec for spec in tensor_specs(ARCH) if small.shape(spec) != partition.shape(spec)]
    assert partition.compaction_due(quantum) == bool(changed)


@given(pruned_partitions())
@settings(max_examples=60, deadline=None)
def test_placement_survives_json(partition: Partition) -> None:
    again = Partition.from_dict(ARCH, json.loads(json.dumps(partition.to_dict())))
    assert again.same_placement(partition)
    assert Architecture.from_dict(json.loads(json.dumps(ARCH.to_dict()))) == ARCH


@given(pruned_partitions())
@settings(max_examples=60, deadline=None)
def test_parameter_count_is_the_sum_over_the_tensors(partition: Partition) -> None:
    arch = partition.architecture()
    assert arch.num_parameters() == sum(int(np.prod(arch.tensor_shape(spec))) for spec in tensor_specs(arch))


@given(pruned_partitions())
@settings(max_examples=60, deadline=None)
def test_kv_heads_live_exactly_as_long_as_a_query_reads_them(partition: Partition) -> None:
    for layer in range(ARCH.num_layers):
        kv_of_head = np.asarray(ARCH.kv_of_head(layer))
        np.testing.assert_array_equal(
            live(partition.kv_heads[layer]), np.unique(kv_of_head[live(partition.heads[layer])])
        )
        slots = partition.kv_slot_of_head(layer)
        for head, slot in zip(partition.heads[layer][0], slots, strict=True):
            assert (slot == DEAD) == (head == DEAD)
            assert head == DEAD or partition.kv_heads[layer][0, slot] == kv_of_head[head]


def test_units_of_a_removal() -> None:
    assert [units(kind, ARCH) for kind in GROUP_TYPES] == [4, 1, 2]
