"""Products of neighbouring weights equal separate ones, and bf16 through fp32 is no less exact."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_prune.parallel import matmul
from megatron_prune.parallel.matmul import linear, linear_together

SIZES = (6, 2, 3)


def neighbours(bias: bool, dtype: torch.dtype = torch.float64, gap: int = 0) -> list[nn.Linear]:
    """Layers whose weights are parts of one buffer, ``gap`` elements between them."""
    torch.manual_seed(0)
    flat = torch.randn(sum(SIZES) * 5 + gap * len(SIZES)).to(dtype)
    layers, start = [], 0
    for size in SIZES:
        layer = nn.Linear(5, size, bias=bias, dtype=dtype)
        layer.weight = nn.Parameter(flat[start : start + size * 5].view(size, 5))
        layers.append(layer)
        start += size * 5 + gap
    return layers


def outputs_and_gradients(outputs: tuple[Tensor, ...], x: Tensor, layers: list[nn.Linear]) -> list[Tensor]:
    loss = sum((output.double().sin().sum() for output in outputs), torch.zeros(()).double())
    parameters = [p for layer in layers for p in layer.parameters()]
    return [*outputs, *torch.autograd.grad(loss, [x, *parameters])]


@pytest.mark.parametrize("gap", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_together_equals_apart(bias: bool, gap: int) -> None:
    layers = neighbours(bias, gap=gap)
    x = torch.randn(2, 4, 5).double().requires_grad_()
    with mock.patch.object(matmul, "_joined", wraps=matmul._joined) as joined:
        found = outputs_and_gradients(linear_together(x, layers), x, layers)
    assert bool(joined.called) == (gap == 0), "neighbours and nothing else are taken together"
    expected = outputs_and_gradients(tuple(F.linear(x, a.weight, a.bias) for a in layers), x, layers)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


def test_weights_in_another_order_are_no_neighbours() -> None:
    first, second, third = neighbours(bias=False)
    x = torch.randn(4, 5).double()
    with mock.patch.object(matmul, "_joined", wraps=matmul._joined) as joined:
        outputs = linear_together(x, (second, first, third))
    assert not joined.called
    assert torch.equal(outputs[1], F.linear(x, first.weight))


@pytest.mark.parametrize("bias", [False, True])
def test_bf16_through_fp32_is_as_exact_as_bf16(bias: bool) -> None:
    layers = neighbours(bias, torch.bfloat16)
    x = torch.randn(3, 4, 5).bfloat16().requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    exact = [nn.Linear(5, size, bias=bias).double() for size in SIZES]
    for layer, narrow in zip(exact, layers, strict=True):
        layer.load_state_dict(narrow.state_dict())
    expected = outputs_and_gradients(tuple(layer(exact_x) for layer in exact), exact_x, exact)
    with mock.patch.object(matmul, "_has_bf16_units", return_value=False):
        together = outputs_and_gradients(linear_together(x, layers), x, layers)
        apart = outputs_and_gradients(tuple(linear(x, a.weight, a.bias) for a in layers), x, layers)
    for found in (together, apart):
        for own, other in zip(found, expected, strict=True):
            assert own.dtype == torch.bfloat16
            torch.testing.assert_close(own.double(), other, rtol=2e-2, atol=4e-2)
