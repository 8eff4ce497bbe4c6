"""The three schedules at hand-computed points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.training.lr import DecayStyle, learning_rate

SETTINGS = {"lr": 1.0, "min_lr": 0.1, "warmup": 4, "total": 14}


def rates(style: DecayStyle, wsd_decay: int | None = None, **changes: float) -> list[float]:
    settings = {**SETTINGS, **changes}
    return [
        learning_rate(
            step,
            lr=settings["lr"],
            min_lr=settings["min_lr"],
            warmup=int(settings["warmup"]),
            total=int(settings["total"]),
            style=style,
            wsd_decay=wsd_decay,
        )
        for step in range(int(settings["total"]) + 3)
    ]


@pytest.mark.parametrize("style", ["constant", "cosine", "WSD"])
def test_warmup_rises_to_the_peak(style: DecayStyle) -> None:
    assert rates(style, wsd_decay=5)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_constant() -> None:
    assert rates("constant")[4:] == [1.0] * 13


def test_cosine() -> None:
    values = rates("cosine")
    assert values[9] == pytest.approx(0.55)  # half way
    assert values[4 + 10 // 5] == pytest.approx(0.1 + 0.9 * (1 + 0.8090169943749475) / 2)
    assert values[14:] == [0.1] * 3


def test_wsd() -> None:
    values = rates("WSD", wsd_decay=5)
    assert values[3:10] == [1.0] * 7
    assert values[9:15] == pytest.approx([1.0, 0.82, 0.64, 0.46, 0.28, 0.1])
    assert values[14:] == pytest.approx([0.1] * 3)


def test_wsd_decay_longer_than_the_run_begins_after_the_warmup() -> None:
    assert rates("WSD", wsd_decay=1000)[4:7] == pytest.approx([1.0, 0.91, 0.82])


def test_no_warmup_and_a_run_that_is_all_warmup() -> None:
    assert rates("cosine", warmup=0)[0] == 1.0
    assert rates("cosine", warmup=14)[13:15] == pytest.approx([1.0, 0.1])


@given(
    step=st.integers(0, 200),
    warmup=st.integers(0, 50),
    total=st.integers(1, 100),
    decay=st.integers(0, 120),
    style=st.sampled_from(["constant", "cosine", "WSD"]),
)
def test_bounded_and_never_rising_after_the_warmup(
    step: int, warmup: int, total: int, decay: int, style: DecayStyle
) -> None:
    now, then = (
        learning_rate(at, lr=3e-4, min_lr=3e-5, warmup=warmup, total=total, style=style, wsd_decay=decay)
        for at in (step, step + 1)
    )
    assert 0 < now <= 3e-4 * (1 + 1e-12)
    if step >= warmup:
        assert now >= 3e-5 * (1 - 1e-12)
        assert then <= now * (1 + 1e-12)


def test_an_empty_wsd_decay_stays_at_the_peak_to_the_end() -> None:
    assert rates("WSD", wsd_decay=0)[4:14] == [1.0] * 10
