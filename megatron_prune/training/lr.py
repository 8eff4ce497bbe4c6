"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Literal

DecayStyle = Literal["constant", "cosine", "WSD"]


def learning_rate(
    step: int,
    *,
    lr: float,
    min_lr: float,
    warmup: int,
    total: int,
    style: DecayStyle,
    wsd_decay: int | None = None,
) -> float:
    """Learning rate of one optimizer step.

    With ``t`` the step, ``W`` the warm-up, ``N`` the total and ``D`` the decay steps of WSD:

    - warm-up, ``t < W``: ``lr * (t + 1) / W`` (the first step is not lost to a rate of zero);
    - ``constant``: ``lr``;
    - ``cosine``: ``min_lr + (lr - min_lr) * (1 + cos(pi * x)) / 2`` with ``x = (t - W) / (N - W)``;
    - ``WSD`` (warm-up, stable, decay): ``lr`` until ``S = max(W, N - D)``, then
      ``lr + (min_lr - lr) * x`` with ``x = (t - S) / (N - S)``.

    From step ``N`` on the decayed styles stay at ``min_lr``. The two stages of a run each have a schedule of their
    own: the caller subtracts the step at which the stage began.

    Args:
        step: optimizer step within the stage, from 0.
        lr: peak rate.
        min_lr: rate at the end of the decay.
        warmup: steps of linear warm-up.
        total: steps of the stage.
        style: what happens after the warm-up.
        wsd_decay: steps of the final decay; for ``WSD`` only.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if style == "constant":
        return lr
    if style == "cosine":
        progress = _progress(step, warmup, total)
        return min_lr + (lr - min_lr) * (1.0 + math.cos(math.pi * progress)) / 2.0
    assert style == "WSD", style
    assert wsd_decay is not None, "WSD needs the length of its decay"
    return lr + (min_lr - lr) * _progress(step, max(warmup, total - wsd_decay), total)


def _progress(step: int, start: int, end: int) -> float:
    """How far a step is between two others, within [0, 1]."""
    if step >= end:
        return 1.0
    if step <= start:  # also when the decay is empty, start == end
        return 0.0
    return (step - start) / (end - start)
