"""Every PyTorch implementation of an operation against its formula in fp64, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_prune.ops import activation, attention, loss, norm, optimizer

NORMS = [norm.rms_norm, norm.fused_rms_norm]
SWIGLUS = [activation.swiglu, activation.fused_swiglu]
ATTENTIONS = [attention.attention, attention.sdpa_attention]
LOSSES = [loss.cross_entropy, loss.fused_cross_entropy]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def assert_same(
    actual: Callable[..., Tensor], expected: Callable[..., Tensor], inputs: list[Tensor], tolerance: float
) -> None:
    """Values and gradients (of a fixed random projection) agree; the expected side computes in fp64."""
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    got, want = actual(*inputs), expected(*wide)
    weights = random(*want.shape, seed=99).detach() if want.dim() else torch.ones((), dtype=torch.float64)
    got_grads = torch.autograd.grad((got.double() * weights).sum(), inputs)
    want_grads = torch.autograd.grad((want * weights).sum(), wide)
    for ours, theirs in zip((got, *got_grads), (want, *want_grads), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def norm_formula(x: Tensor, weight: Tensor, eps: float, live: int) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = [row / ((row[:live] ** 2).sum() / live + eps) ** 0.5 * weight for row in rows]
    return torch.stack(out).reshape(x.shape)


@pytest.mark.parametrize("implementation", NORMS)
@pytest.mark.parametrize("live", [24, 17])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_rms_norm(implementation: norm.RmsNorm, live: int, dtype: torch.dtype, tolerance: float) -> None:
    x, weight, eps = random(2, 3, 24, dtype=dtype), random(24, seed=1, dtype=dtype), 0.1
    x = (x.detach() * (torch.arange(24) < live)).requires_grad_()
    assert_same(
        lambda x, w: implementation(x, w, eps, live)[..., :live],
        lambda x, w: norm_formula(x, w, eps, live)[..., :live],
        [x, weight],
        tolerance,
    )


@pytest.mark.parametrize("implementation", NORMS)
def test_rms_norm_of_padding_is_the_sliced_norm(implementation: norm.RmsNorm) -> None:
    x, weight = random(5, 10, dtype=torch.float32).detach(), random(10, seed=1, dtype=torch.float32).detach()
    padded, gains = torch.zeros(5, 16), torch.zeros(16)
    padded[:, :10], gains[:10] = x, weight
    result = implementation(padded, gains, 1e-5, 10)
    torch.testing.assert_close(result[:, :10], implementation(x, weight, 1e-5, 10), rtol=1e-6, atol=1e-6)
    assert not result[:, 10:].any()


def test_rms_norm_rounds_as_hugging_face_does() -> None:
    x, weight = random(7, 32, dtype=torch.bfloat16).detach(), random(32, seed=1, dtype=torch.bfloat16).detach()
    statistics = x.float().pow(2).mean(-1, keepdim=True)
    expected = weight * (x.float() * torch.rsqrt(statistics + 1e-5)).to(torch.bfloat16)
    assert torch.equal(norm.rms_norm(x, weight, 1e-5, 32), expected)


@pytest.mark.parametrize("implementation", SWIGLUS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_swiglu(implementation: activation.Swiglu, dtype: torch.dtype, tolerance: float) -> None:
    inputs = [random(3, 9, dtype=dtype), random(3, 9, seed=1, dtype=dtype)]
    assert_same(implementation, lambda gate, up: gate / (1 + torch.exp(-gate)) * up, inputs, tolerance)


def test_fused_swiglu_saves_two_tensors() -> None:
    def saved(function: activation.Swiglu) -> int:
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            function(random(4, 4), random(4, 4, seed=1))
        return len({tensor.data_ptr() for tensor in kept})

    assert (saved(activation.swiglu), saved(activation.fused_swiglu)) == (3, 2)


def attention_formula(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    batch, heads, length, width = q.shape
    group = heads // k.shape[1]
    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                first = 0 if window is None else max(0, i - window + 1)
                keys, values = k[b, h // group, first : i + 1], v[b, h // group, first : i + 1]
                rows.append(torch.softmax(keys @ q[b, h, i] / width**0.5, 0) @ values)
    return torch.stack(rows).reshape(q.shape)


@pytest.mark.parametrize("implementation", ATTENTIONS)
@pytest.mark.parametrize("kv_heads", [6, 3, 1])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_attention(implementation: attention.Attention, kv_heads: int, window: int | None) -> None:
    inputs = [random(2, 6, 7, 4), random(2, kv_heads, 7, 4, seed=1), random(2, kv_heads, 7, 4, seed=2)]
    assert_same(
        lambda q, k, v: implementation(q, k, v, window),
        lambda q, k, v: attention_formula(q, k, v, window),
        inputs,
        1e-10,
    )


@settings(max_examples=25)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.integers(1, 9),
    width=st.integers(1, 5),
    window=st.none() | st.integers(1, 12),
)
def test_attentions_agree_in_fp32(
    batch: int, kv_heads: int, group: int, length: int, width: int, window: int | None
) -> None:
    inputs = [
        random(batch, heads, length, width, seed=seed, dtype=torch.float32)
        for seed, heads in enumerate((kv_heads * group, kv_heads, kv_heads))
    ]
    assert_same(
        lambda q, k, v: attention.sdpa_attention(q, k, v, window),
        lambda q, k, v: attention.attention(q, k, v, window),
        inputs,
        1e-5,
    )


@pytest.mark.parametrize("implementation", LOSSES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_cross_entropy(implementation: loss.CrossEntropy, dtype: torch.dtype, tolerance: float) -> None:
    labels = torch.tensor([3, 0, 10, 3, 7])

    def formula(logits: Tensor) -> Tensor:
        rows = [-(row[label].exp() / row.exp().sum()).log() for row, label in zip(logits, labels, strict=True)]
        return torch.stack(rows).mean()

    assert_same(lambda logits: implementation(logits, labels), formula, [random(5, 11, dtype=dtype)], tolerance)


@pytest.mark.parametrize("implementation", LOSSES)
def test_cross_entropy_of_bf16_logits_is_fp32(implementation: loss.CrossEntropy) -> None:
    logits, labels = (random(6, 40, dtype=torch.bfloat16).detach() * 30), torch.arange(6)
    result = implementation(logits, labels)
    assert result.dtype == torch.float32
    exact = loss.cross_entropy(logits.double(), labels)
    torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-6)


def adam_formula(
    weight: Tensor, gradients: list[Tensor], lr: float, betas: tuple[float, float], eps: float, decay: float
) -> Tensor:
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        unbiased = first / (1 - betas[0] ** step), second / (1 - betas[1] ** step)
        weight = weight - lr * decay * weight - lr * unbiased[0] / (unbiased[1].sqrt() + eps)
    return weight


@pytest.mark.parametrize("implementation", [optimizer.adam, optimizer.fused_adam])
def test_adam(implementation: optimizer.Adam) -> None:
    start = random(3, 5).detach()
    gradients = [random(3, 5, seed=seed).detach() for seed in range(1, 6)]
    dead = start.clone()
    dead[1] = 0.0  # a removed group: no weight, no gradient
    for gradient in gradients:
        gradient[1] = 0.0
    parameter = torch.nn.Parameter(dead.clone())
    built = implementation([parameter], 0.05, (0.8, 0.95), 1e-3, 0.1)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        built.step()
    expected = adam_formula(dead, gradients, 0.05, (0.8, 0.95), 1e-3, 0.1)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)
    assert not parameter.detach()[1].any()
    assert set(built.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("implementation", [optimizer.adam, optimizer.fused_adam])
def test_adam_takes_groups_with_their_own_decay(implementation: optimizer.Adam) -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]
    built = implementation(groups, 0.1, (0.9, 0.95), 1e-8, 0.5)
    for parameter in parameters:
        parameter.grad = torch.zeros(2)
    built.step()
    torch.testing.assert_close(parameters[0].detach(), torch.full((2,), 0.95))
    assert torch.equal(parameters[1].detach(), torch.ones(2))
