"""What the loop asks of whatever prunes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from megatron_prune.architecture import Architecture
from megatron_prune.pruning.groups import GroupType
from megatron_prune.pruning.planner import Decision


class Removals(Protocol):
    """Decides what goes and takes it out, such as :class:`~megatron_prune.training.pruner.Pruner`."""

    @property
    def met(self) -> bool:
        """True when the model is at or under the target."""

    def met_by(self, arch: Architecture) -> bool:
        """True for a model at or under the target."""

    def pace_from(self, step: int, spent: int) -> None:
        """Count what is due from a step on, when so many units had been spent."""

    @property
    def memory(self) -> str:
        """What a checkpoint has to hold of it beside the counters; empty for nothing."""

    def remember(self, memory: str) -> None:
        """Go on as it was when that was its memory."""

    @property
    def chosen(self) -> int:
        """Groups chosen and not carried out."""

    def due(self, step: int, spent: int) -> bool:
        """True when optimizer step ``step`` (0-based) has to look at its gradients."""

    def decide(self, step: int, spent: int, doubted: Callable[[Decision], bool]) -> GroupType | None:
        """Choose from the gradients in place; returns the type of a choice that was doubted, which is none then."""

    def commit(self) -> Iterator[Decision]:
        """Remove what was chosen; yields after each removal."""

    def discard(self) -> None:
        """Forget what was chosen."""
