"""From fragments to one score per unit; the sums of a fragment themselves are tested in tests/unit/ops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_prune.architecture import Architecture, TensorSpec, uniform_kv_groups
from megatron_prune.ops.saliency_torch import TorchSaliency
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.placement import place
from megatron_prune.pruning.groups import MiniGroup, remove
from megatron_prune.pruning.saliency import Fragment, SaliencyVectors, Sums, accumulate

ARCH = Architecture("llama", 1, 6, 10, 2, uniform_kv_groups(1, 2, 2), 4, 9)
DOWN = TensorSpec("model.layers.0.mlp.down_proj.weight", ("stem", "ffn"), 0)
OUT = TensorSpec("model.layers.0.self_attn.o_proj.weight", ("stem", "heads"), 0)


def vectors(fragments: list[Fragment], partition: Partition, rank: int = 0) -> SaliencyVectors:
    return accumulate(fragments, partition, "taylor", TorchSaliency(), [0], Sums(), torch.device("cpu"), rank)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_reported(value: float) -> None:
    grad = torch.ones(60)
    grad[7] = value
    assert not vectors([Fragment(DOWN, torch.ones(60), grad, 0, (6, 10))], Partition.of(ARCH)).finite
    good = vectors([Fragment(DOWN, torch.ones(60), torch.ones(60), 0, (6, 10))], Partition.of(ARCH))
    assert good.finite
    assert good.ffn.tolist() == [[6.0] * 10]
    assert good.stem.tolist() == [10.0] * 6


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_fragments_of_all_ranks_give_the_sums_of_the_logical_matrices(ranks: int) -> None:
    partition = remove(remove(Partition.of(ARCH, ranks), MiniGroup("ffn", (3,))), MiniGroup("stem", 2))
    generator = torch.Generator().manual_seed(0)
    arch = partition.architecture()
    weights = {spec: torch.rand(arch.tensor_shape(spec), generator=generator) for spec in (DOWN, OUT)}
    parts = []
    for rank in range(ranks):
        fragments = []
        for spec, weight in weights.items():
            physical = place(weight, spec, partition, rank)
            rows, columns = physical.shape
            flat, cut = physical.flatten(), physical.numel() // 3 + 1
            fragments += [
                Fragment(spec, piece, torch.ones_like(piece), start, (rows, columns))
                for start, piece in ((0, flat[:cut]), (cut, flat[cut:]))
            ]
        parts.append(vectors(fragments, partition, rank))
    heads = weights[OUT].double().view(5, 2, 4).sum((0, 2))
    np.testing.assert_allclose(np.sum([part.heads for part in parts], axis=0)[0], heads.numpy(), rtol=1e-6)
    live_ffn = [channel for channel in range(10) if channel != 3]
    ffn, stem = np.sum([part.ffn for part in parts], axis=0)[0], np.sum([part.stem for part in parts], axis=0)
    np.testing.assert_allclose(ffn[live_ffn], weights[DOWN].double().sum(0).numpy(), rtol=1e-6)
    assert np.isinf(ffn[3])
    by_row = weights[DOWN].double().sum(1) + weights[OUT].double().sum(1)
    np.testing.assert_allclose(stem[[0, 1, 3, 4, 5]], by_row.numpy(), rtol=1e-6)
    assert np.isinf(stem[2])
