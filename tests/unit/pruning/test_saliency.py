"""Row and column sums from any cut of a matrix into fragments."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from megatron_prune.architecture import Architecture, TensorSpec, uniform_kv_groups
from megatron_prune.parallel.partition import Partition
from megatron_prune.pruning.metrics import magnitude, taylor
from megatron_prune.pruning.saliency import Fragment, Sums, accumulate, fragment_sums

ARCH = Architecture("llama", 1, 6, 10, 2, uniform_kv_groups(1, 2, 2), 4, 9)
DOWN = TensorSpec("model.layers.0.mlp.down_proj.weight", ("stem", "ffn"), 0)


@given(st.integers(1, 9), st.integers(1, 17), st.data())
@settings(max_examples=100, deadline=None)
def test_fragment_sums_add_up_to_the_matrix(rows: int, columns: int, data: st.DataObject) -> None:
    scores = torch.rand(rows, columns, dtype=torch.float64)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows * columns), max_size=4)))
    total_rows, total_columns = torch.zeros(rows).double(), torch.zeros(columns).double()
    start = 0
    for piece in scores.flatten().tensor_split(cuts):
        piece_rows, piece_columns = fragment_sums(piece, start, (rows, columns))
        total_rows += piece_rows
        total_columns += piece_columns
        start += piece.numel()
    torch.testing.assert_close(total_rows, scores.sum(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total_columns, scores.sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_formed_in_fp32_or_wider(dtype: torch.dtype) -> None:
    weight, grad = torch.randn(100).to(dtype), torch.randn(100).to(dtype)
    expected = (weight.double() * grad.double()).abs()
    torch.testing.assert_close(taylor(weight, grad).double(), expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(magnitude(weight, grad).double(), weight.double().abs(), rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_reported(value: float) -> None:
    grad = torch.ones(60)
    grad[7] = value
    fragment = Fragment(DOWN, torch.ones(60), grad, 0, (6, 10))
    bad = accumulate([fragment], Partition.of(ARCH), "taylor", [0], Sums(), torch.device("cpu"))
    assert not bad.finite
    good = accumulate(
        [Fragment(DOWN, torch.ones(60), torch.ones(60), 0, (6, 10))],
        Partition.of(ARCH),
        "taylor",
        [0],
        Sums(),
        torch.device("cpu"),
    )
    assert good.finite
    assert good.ffn.tolist() == [[6.0] * 10]
    assert good.stem.tolist() == [10.0] * 6
