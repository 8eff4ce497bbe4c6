"""Every element has one owner under any layout, and an owner has only what its place in the layout lets it train."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest

from megatron_prune.architecture import Architecture, tensor_specs, uniform_kv_groups
from megatron_prune.errors import UserError
from megatron_prune.parallel.fragments import Layout, Place, fragment_places
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.stages import stage_layers

LAYOUTS = [Layout(), Layout(3), Layout(1, 3), Layout(1, 1, 4), Layout(2, 2, 3), Layout(1, 5, 2)]


def make_partition(tied: bool, tensor: int) -> Partition:
    source = Architecture("llama", 5, 12, 20, 6, uniform_kv_groups(5, 6, 3), 4, 17, tie_embeddings=tied)
    return Partition.of(source, tensor)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_pieces_cover_every_tensor_once(layout: Layout, tied: bool) -> None:
    partition = make_partition(tied, layout.tensor)
    found: dict[tuple[str, int], list[Place]] = defaultdict(list)
    for place in fragment_places(partition, layout):
        found[place.spec.name, place.tp_rank].append(place)
    specs = tensor_specs(partition.source)
    assert found.keys() == {(spec.name, rank) for spec in specs for rank in range(layout.tensor)}
    for spec in specs:
        for tp_rank in range(layout.tensor):
            end = 0
            for place in sorted(found[spec.name, tp_rank], key=lambda place: place.start):
                assert place.start == end
                assert place.numel > 0
                end += place.numel
            assert end == math.prod(partition.shape(spec))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_own_their_stage_and_an_equal_share(layout: Layout) -> None:
    partition = make_partition(False, layout.tensor)
    stages = stage_layers(partition.source.num_layers, layout.pipeline)
    owned: dict[tuple[int, bool], int] = defaultdict(int)
    for place in fragment_places(partition, layout):
        stage, tp_rank = place.rank // (layout.data * layout.tensor), place.rank % layout.tensor
        assert tp_rank == place.tp_rank
        if place.spec.layer is not None:
            assert place.spec.layer in stages[stage]
        else:
            assert stage == (0 if "embed" in place.spec.name else layout.pipeline - 1)
        owned[place.rank, len(place.spec.axes) > 1] += place.numel
    for stage in range(layout.pipeline):
        ranks = range(stage * layout.data * layout.tensor, (stage + 1) * layout.data * layout.tensor)
        sizes = [owned[rank, True] for rank in ranks]
        assert max(sizes) - min(sizes) < 2 * layout.data, "only the last copy's share ends in padding"


def test_more_stages_than_layers_is_a_user_error() -> None:
    with pytest.raises(UserError, match="--pipeline-model-parallel-size 6"):
        list(fragment_places(make_partition(True, 1), Layout(1, 6)))
