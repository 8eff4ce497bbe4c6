"""When a run should doubt what it sees: steps skipped in a row, a spike of saliency, a jump of the loss.

Pure functions of what a checkpoint holds (the ledger, a few recent losses), so a resumed run doubts what the
uninterrupted one would have doubted, and of numbers that every rank has, so all ranks doubt together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from megatron_prune.pruning.groups import GroupType
from megatron_prune.pruning.ledger import Event

#: What is running about the running medians: the last so many removals, or losses.
WINDOW = 32
#: Fewer say nothing about what is usual.
_LEAST = 8


def spiked(kind: GroupType, score: float, events: Sequence[Event], factor: float | None) -> bool:
    """True if the group to be removed scores above ``factor`` times what its type usually scores.

    One bad batch gives every weight a large gradient; what is least salient in it says little.

    Args:
        kind: type of the group.
        score: its score.
        events: the ledger so far. Its lines carry the score of every type, whichever was removed.
        factor: multiple of the median over the last removals, or None not to doubt.
    """
    if factor is None:
        return False
    usual = usual_score(kind, events)
    return usual is not None and score > factor * usual


def usual_score(kind: GroupType, events: Sequence[Event]) -> float | None:
    """Median score of a type over the last removals, or None while there are too few."""
    scores = [event.scores[kind] for event in events[-WINDOW:] if kind in event.scores]
    return statistics.median(scores) if len(scores) >= _LEAST else None


def jumped(loss: float, recent: Sequence[float], nats: float | None) -> bool:
    """True if a step's loss is more than ``nats`` above the median of the losses before it.

    Args:
        loss: of the step.
        recent: losses of the steps before, the newest last.
        nats: the jump that is too high, or None not to doubt.
    """
    if nats is None or len(recent) < _LEAST:
        return False
    return not loss <= statistics.median(recent) + nats  # a loss that is no number is a jump too


def remembered(loss: float, recent: Sequence[float]) -> tuple[float, ...]:
    """The recent losses with one more; one that is not finite is left out."""
    return (*recent, loss)[-WINDOW:] if math.isfinite(loss) else tuple(recent)
