"""The mean that --saliency-ema decides by."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.pruning.saliency import SaliencyVectors
from megatron_prune.pruning.smoothing import Average

ARCH = Architecture("llama", 2, 4, 5, 3, uniform_kv_groups(2, 3, 3), 2, 11)
BETA = 0.75


def measured(seed: int) -> SaliencyVectors:
    draw = np.random.default_rng(seed)
    vectors = SaliencyVectors(draw.random((2, 3)), draw.random((2, 5)), draw.random(4))
    vectors.heads[0, 1] = np.inf
    return vectors


def test_it_is_the_weighted_mean() -> None:
    average = Average.empty(BETA, ARCH)
    for seed in range(3):
        average = average.including(measured(seed))
    mean = average.of(measured(2))
    weights = np.array([BETA**2, BETA, 1.0])
    weights /= weights.sum()
    for name in ("heads", "ffn", "stem"):
        expected = sum(weight * getattr(measured(seed), name) for seed, weight in enumerate(weights))
        np.testing.assert_allclose(getattr(mean, name), expected, rtol=1e-13)
    assert np.isinf(mean.heads).sum() == 1


def test_the_mean_of_one_is_that_one() -> None:
    np.testing.assert_allclose(Average.empty(BETA, ARCH).including(measured(0)).of(measured(0)).ffn, measured(0).ffn)


def test_its_text_keeps_every_bit() -> None:
    average = Average.empty(BETA, ARCH).including(measured(0)).including(measured(1))
    again = Average.from_text(BETA, ARCH, average.to_text())
    assert again.measured == 2
    assert np.array_equal(again.total, average.total)


@pytest.mark.parametrize("text", ["", "1", "x:", "1:AAAA", "1:!", "-1:", "9" * 20 + ":", "\u0661:"])
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Average.from_text(BETA, ARCH, text)


def test_a_text_that_is_not_finite_is_refused() -> None:
    packed = base64.b64encode(np.full(Average.empty(BETA, ARCH).total.size, np.nan).tobytes()).decode()
    with pytest.raises(ValueError, match="not finite"):
        Average.from_text(BETA, ARCH, f"1:{packed}")
