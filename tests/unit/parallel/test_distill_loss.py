"""The distillation loss against its definition on full logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_prune.parallel.distill_loss import Guide, linear_distillation
from megatron_prune.parallel.layers import TensorParallel
from megatron_prune.parallel.linear_loss import linear_cross_entropy

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB, PADDED = 13, 6, 10, 23, 25


def _problem() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden, weight, taught, teacher = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((TOKENS, HIDDEN), (PADDED, HIDDEN), (TOKENS, TEACHER_HIDDEN), (PADDED, TEACHER_HIDDEN))
    )
    return hidden, weight, taught, teacher, torch.randint(VOCAB, (TOKENS,), generator=draw)


def _reference(
    hidden: Tensor, weight: Tensor, taught: Tensor, teacher: Tensor, labels: Tensor, share: float, temperature: float
) -> Tensor:
    """With torch's own KL divergence, on logits that exist."""
    student, known = hidden @ weight[:VOCAB].T, taught @ teacher[:VOCAB].T
    divergence = functional.kl_div(
        functional.log_softmax(student / temperature, dim=1),
        functional.log_softmax(known / temperature, dim=1),
        log_target=True,
        reduction="batchmean",
    )
    return (1 - share) * functional.cross_entropy(student, labels) + share * temperature**2 * divergence


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("chunk", [4, None])
def test_equals_the_definition(share: float, temperature: float, chunk: int | None) -> None:
    hidden, weight, taught, teacher, labels = _problem()
    gradients = []
    for given in (True, False):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if given:
            guide = Guide(teacher, share, temperature)
            loss = linear_distillation(x, w, labels, taught, guide, 0, VOCAB, TensorParallel(), chunk)
        else:
            loss = _reference(x, w, taught, teacher, labels, share, temperature)
        (3 * loss).backward()
        assert x.grad is not None
        assert w.grad is not None
        gradients.append((loss.detach(), x.grad, w.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_without_a_share_it_is_cross_entropy() -> None:
    hidden, weight, taught, teacher, labels = _problem()
    loss = linear_distillation(hidden, weight, labels, taught, Guide(teacher, 0.0, 2.0), 0, VOCAB, TensorParallel())
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, labels, 0, VOCAB, TensorParallel()))


def test_a_student_that_knows_all_has_nothing_to_learn() -> None:
    _, _, taught, teacher, labels = _problem()
    x = taught.clone().requires_grad_()
    loss = linear_distillation(x, teacher, labels, taught, Guide(teacher, 1.0, 3.0), 0, VOCAB, TensorParallel())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert x.grad is not None
    assert x.grad.abs().max() < 1e-12
