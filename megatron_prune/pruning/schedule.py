"""When to prune: units per optimizer step (paper's pruning : gradient ratio)."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Schedule:
    """``pruning`` units every ``gradient`` optimizer steps, from step ``start`` on.

    A group may be removed while fewer units have been spent than are due. A head spends ``head_dim`` units at once and
    is therefore followed by that many units' worth of steps without pruning.

    Attributes:
        pruning: units per period (the P of ``P:G``).
        gradient: optimizer steps per period (the G).
        start: optimizer steps before the first removal.
        spent_before: units spent when the schedule took over, for a run that changes its pace half-way.
    """

    pruning: int
    gradient: int
    start: int
    spent_before: int = 0

    def due(self, step: int) -> int:
        """Units that may have been spent once optimizer step ``step`` (0-based) has pruned."""
        if step < self.start:
            return self.spent_before
        return self.spent_before + self.pruning * ((step - self.start) // self.gradient + 1)

    def wants(self, step: int, spent: int) -> bool:
        """True when step ``step`` has to remove another group after ``spent`` units."""
        return spent < self.due(step)
