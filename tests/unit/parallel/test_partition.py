"""Slots, liveness and compaction, over random removals."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given, settings

from megatron_prune.architecture import Architecture, tensor_specs, uniform_kv_groups
from megatron_prune.parallel.partition import DEAD, Partition, live
from megatron_prune.parallel.placement import blocks, deposit_, kept_mask, place, take
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
def pruned_partitions(draw: st.DrawFn, most_ranks: int = 4) -> Partition:
    partition = Partition.of(ARCH, draw(st.integers(1, most_ranks)))
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
@settings(max_examples=40)
def test_compaction_keeps_live_units_and_aligns_widths(partition: Partition, quantum: int) -> None:
    small = partition.compacted(quantum)
    ranks = partition.tensor_parallel
    assert small.architecture() == partition.architecture()
    assert small.tensor_parallel == ranks
    stems = [(partition.stem[None], small.stem[None], 1)]
    for old, new, parts in (*stems, *((a, b, ranks) for a, b in zip(partition.ffn, small.ffn, strict=True))):
        np.testing.assert_array_equal(live(old), live(new))
        width, needed = new.shape[1], -(-len(live(new)) // parts)
        assert width <= old.shape[1]
        assert width == old.shape[1] or (width % quantum == 0 and width - needed < quantum)
    for heads in small.heads:
        assert heads.shape[1] == -(-len(live(heads)) // ranks)
    assert not small.compaction_due(quantum), "compacting twice gains nothing"
    shrunk = [s for s in tensor_specs(ARCH) if small.shape(s) != partition.shape(s) and "kv_heads" not in s.axes]
    assert partition.compaction_due(quantum) == bool(shrunk)


@given(pruned_partitions(), st.integers(1, 5), st.sampled_from([1, 8]))
@settings(max_examples=40)
def test_ranks_get_equal_shares_and_the_kv_heads_they_need(partition: Partition, ranks: int, quantum: int) -> None:
    spread = partition.spread(ranks, quantum)
    assert spread.architecture() == partition.architecture()
    source = Partition.of(ARCH, ranks)
    assert len(spread.stem) <= len(source.stem)
    assert spread.ffn[0].shape[1] <= source.ffn[0].shape[1], "never wider than the source"
    for layer in range(ARCH.num_layers):
        for array in (spread.ffn[layer], spread.heads[layer]):
            counts = [len(live(row)) for row in array]
            assert max(counts) - min(counts) <= 1
            assert len(live(array)) == len(set(live(array).tolist())), "a head or channel is on one rank"
        kv_of_head = np.asarray(ARCH.kv_of_head(layer))
        for heads, kv_heads in zip(spread.heads[layer], spread.kv_heads[layer], strict=True):
            np.testing.assert_array_equal(live(kv_heads), np.unique(kv_of_head[live(heads)]))


@given(pruned_partitions(), st.sampled_from([1, 8]))
@settings(max_examples=20)
def test_fragments_of_all_ranks_add_up_to_the_logical_tensor(partition: Partition, quantum: int) -> None:
    arch = partition.architecture()
    for where in (partition, partition.compacted(quantum)):
        for spec in tensor_specs(ARCH):
            logical = torch.randn(arch.tensor_shape(spec), generator=torch.Generator().manual_seed(1))
            assert where.logical_shape(spec) == tuple(logical.shape)
            total, kept = torch.zeros_like(logical), 0
            for rank in range(where.tensor_parallel):
                physical = place(logical, spec, where, rank)
                assert physical.shape == where.shape(spec, rank)
                cut = physical.numel() // 3  # two fragments, as two ZeRO ranks hold them
                for start, piece in ((0, physical.flatten()[:cut]), (cut, physical.flatten()[cut:])):
                    assert torch.equal(take(logical, spec, where, rank, start, piece.numel()), piece)
                    addend = torch.zeros_like(logical)
                    deposit_(addend, piece, spec, where, rank, start)
                    total += addend
                    mask = kept_mask(spec, where, rank, start, piece.numel())
                    kept += int(mask.sum())
                    assert torch.equal(piece[mask].sort().values, addend[addend != 0].sort().values)
            assert torch.equal(total, logical), spec.name
            assert kept == logical.numel(), "every element has one keeper"


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 9))
def test_blocks_cover_a_fragment_once_and_in_order(start: int, numel: int, width: int) -> None:
    matrix = torch.arange(81 * width).view(-1, width)
    fragment = matrix.flatten()[start : start + numel]
    pieces = list(blocks(start, numel, width))
    assert len(pieces) <= 3
    assert torch.equal(torch.cat([matrix[b.rows, b.columns].flatten() for b in pieces]), fragment)
    assert all(torch.equal(matrix[b.rows, b.columns], b.view(fragment)) for b in pieces)


@given(pruned_partitions())
@settings(max_examples=40)
def test_placement_survives_json(partition: Partition) -> None:
    again = Partition.from_dict(ARCH, json.loads(json.dumps(partition.to_dict())))
    assert again.to_dict() == partition.to_dict()
    assert Architecture.from_dict(json.loads(json.dumps(ARCH.to_dict()))) == ARCH


@given(pruned_partitions())
@settings(max_examples=40)
def test_parameter_count_is_the_sum_over_the_tensors(partition: Partition) -> None:
    arch = partition.architecture()
    assert arch.num_parameters() == sum(int(np.prod(arch.tensor_shape(spec))) for spec in tensor_specs(arch))


@given(pruned_partitions())
@settings(max_examples=40)
def test_kv_heads_live_exactly_as_long_as_a_query_reads_them(partition: Partition) -> None:
    for layer in range(ARCH.num_layers):
        kv_of_head = np.asarray(ARCH.kv_of_head(layer))
        np.testing.assert_array_equal(
            np.unique(live(partition.kv_heads[layer])), np.unique(kv_of_head[live(partition.heads[layer])])
        )
        for rank in range(partition.tensor_parallel):
            slots = partition.kv_slot_of_head(layer, rank)
            for head, slot in zip(partition.heads[layer][rank], slots, strict=True):
                assert (slot == DEAD) == (head == DEAD)
                assert head == DEAD or partition.kv_heads[layer][rank, slot] == kv_of_head[head]


def test_units_of_a_removal() -> None:
    assert [units(kind, ARCH) for kind in GROUP_TYPES] == [4, 1, 2]
