"""Shares of a global batch: together they are the batch, and their weighted means its mean."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prune.parallel.linear_loss import IGNORED
from megatron_prune.training.batches import Batches

SEQ_LENGTH = 12
SAMPLES = 8


class Rows:
    """Sample ``n`` holds ``100 n + position``; the first ``n % 5 + 1`` targets from position 2 on count."""

    def batch(self, first: int, count: int) -> Tensor:
        return torch.stack([100 * n + torch.arange(SEQ_LENGTH + 1) for n in range(first, first + count)])

    def counted(self, first: int, count: int) -> Tensor | None:
        at = torch.arange(SEQ_LENGTH)
        return torch.stack([(at >= 2) & (at < 3 + n % 5) for n in range(first, first + count)])

    def fingerprint(self) -> str:
        return ""


class AllCount(Rows):
    def counted(self, first: int, count: int) -> None:
        return None


def batches(order: Any, micro: int, copies: int, copy: int, pp: int = 1, tp: int = 1) -> Batches:
    mesh: Any = SimpleNamespace(dp_size=copies, dp_rank=copy, pp_size=pp, tp_size=tp, device=torch.device("cpu"))
    return Batches(order, None, micro, SAMPLES, mesh)


@pytest.mark.parametrize(("micro", "copies"), [(8, 1), (1, 1), (2, 2), (1, 4), (4, 2)])
@pytest.mark.parametrize("consumed", [0, 16])
def test_the_mean_over_the_targets_of_the_whole_batch(micro: int, copies: int, consumed: int) -> None:
    """What the pipeline does: the sum of a micro-batch's losses over the given number, then the mean of all."""
    losses = []
    for copy in range(copies):
        for tokens, target in batches(Rows(), micro, copies, copy).training(consumed):
            assert isinstance(target, tuple)
            labels, mean_count = target
            counts = labels != IGNORED
            losses.append((labels[counts].sqrt().sum() / mean_count).item())
            assert labels[counts].equal((tokens + 1)[counts])
    whole, counted = Rows().batch(consumed, SAMPLES)[:, 1:], Rows().counted(consumed, SAMPLES)
    assert counted is not None
    assert sum(losses) / len(losses) == pytest.approx(whole[counted].sqrt().mean().item(), rel=1e-6)


def test_samples_are_cut_to_the_longest_where_nothing_waits_for_all_of_them() -> None:
    first = lambda **layout: next(batches(Rows(), 2, 1, 0, **layout).training(0))[0].shape[1]  # noqa: E731
    assert first() == 4  # samples 0 and 1: targets 2 and 3
    assert first(tp=3) == 6
    assert first(pp=2) == SEQ_LENGTH


def test_plain_samples_stay_as_they_are() -> None:
    (tokens, labels), *rest = batches(AllCount(), 4, 1, 0).training(8)
    assert len(rest) == 1
    assert isinstance(labels, Tensor)
    assert tokens.equal(Rows().batch(8, 4)[:, :-1])
    assert labels.equal(Rows().batch(8, 4)[:, 1:])
