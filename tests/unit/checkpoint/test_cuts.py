"""A fragment read from shards is the one cut out of the whole tensor, and no more than it needs is read."""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tiny_checkpoint import ARCH, SPECS, save_split

from megatron_prune.checkpoint.shards import Piece
from megatron_prune.checkpoint.store import Checkpoint
from megatron_prune.parallel.partition import Partition, live
from megatron_prune.parallel.placement import take
from megatron_prune.pruning.groups import MiniGroup, remove


@st.composite
def pruned_partitions(draw: st.DrawFn) -> Partition:
    partition = Partition.of(ARCH, draw(st.integers(1, 3)))
    for kind in draw(st.lists(st.sampled_from(["attention", "ffn", "stem"]), max_size=6)):
        layers = {"attention": partition.heads, "ffn": partition.ffn}.get(kind, ())
        arrays = [live(array) for array in layers] or [live(partition.stem)]
        if len(arrays[0]) == 1:
            continue
        chosen = [int(draw(st.sampled_from(array.tolist()))) for array in arrays]
        group = MiniGroup("stem", chosen[0]) if kind == "stem" else MiniGroup(kind, tuple(chosen))  # type: ignore[arg-type]
        partition = remove(partition, group)
        if draw(st.booleans()):
            partition = partition.compacted(draw(st.sampled_from([1, 2])))
    return partition


@given(pruned_partitions(), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.data())
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_fragment_of_any_layout(
    partition: Partition, copies: int, ranks: int, same: bool, data: st.DataObject
) -> None:
    target = partition if same else partition.spread(ranks, data.draw(st.sampled_from([1, 4])))
    with tempfile.TemporaryDirectory() as directory:
        path, states = save_split(Path(directory), partition, 4, copies)
        checkpoint = Checkpoint(path)
        for (name, kind), tensor in states.items():
            spec = SPECS[name]
            assert torch.equal(checkpoint.live(spec, kind), tensor)
            tp_rank = data.draw(st.integers(0, target.tensor_parallel - 1))
            size = torch.Size(target.shape(spec, tp_rank)).numel()
            start = data.draw(st.integers(0, size))
            where = (target, tp_rank, start, data.draw(st.integers(0, size - start)))
            assert torch.equal(checkpoint.fragment(spec, kind, *where), take(tensor, spec, *where)), (name, where)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_a_rank_reads_its_own_share_on_the_same_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    partition, spec = Partition.of(ARCH, 2), SPECS[name]
    path, _ = save_split(tmp_path, partition, 1, copies=2)
    checkpoint = Checkpoint(path)
    read: list[tuple[str, int]] = []
    original = Piece.read

    def counted(piece: Piece, first: int, count: int) -> torch.Tensor:
        read.append((piece.shard.name, count))
        return original(piece, first, count)

    monkeypatch.setattr(Piece, "read", counted)
    half = torch.Size(partition.shape(spec, 1)).numel() // 2
    checkpoint.fragment(spec, "master", partition, 1, half, half)
    assert read == [("rank_00003.safetensors", half)], "the shard of this rank, and half of its tensor"
