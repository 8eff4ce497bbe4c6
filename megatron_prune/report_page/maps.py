"""The ledger as a picture: which heads and channels of which layer went, and when."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from megatron_prune.pruning.ledger import Event
from megatron_prune.report_page.records import Run

#: Columns of a map; more heads or channels than that share cells.
MAX_COLUMNS: Final = 64
MAX_STEM_COLUMNS: Final = 128


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """One map, a row for every layer.

    Attributes:
        id: of its element in the page.
        title: what it shows.
        unit: what a column counts.
        bounds: first index of every column, and the number of indices.
        removed: for every row and column, how many are gone.
        when: for every row and column the step of the last removal there, or None.
        last_step: of the run, for the colours.
        empty: what to say where there is nothing to draw.
        has_layers: whether rows are layers (the stem's single row is the whole model).
    """

    id: str
    title: str
    unit: str
    bounds: list[int]
    removed: list[list[int]]
    when: list[list[int | None]]
    last_step: int
    empty: str
    has_layers: bool = True

    @property
    def drawn(self) -> bool:
        """Whether there is something to draw."""
        return bool(self.removed)

    def data(self) -> dict[str, Any]:
        """JSON for the script."""
        names = ("id", "title", "unit", "bounds", "removed", "when", "has_layers")
        return {**{name: getattr(self, name) for name in names}, "last": self.last_step}


def heat_maps(run: Run) -> list[HeatMap]:
    """The three maps of the page."""
    return [
        _map(run, "attention", "map-heads", "Removed attention heads", "head", MAX_COLUMNS),
        _map(run, "ffn", "map-ffn", "Removed FFN channels", "channel", MAX_COLUMNS),
        _map(run, "stem", "map-stem", "Removed stem channels", "channel", MAX_STEM_COLUMNS),
    ]


def _map(run: Run, kind: str, name: str, title: str, unit: str, most: int) -> HeatMap:
    width, layers = run.source_width(kind), 1 if kind == "stem" else run.num_layers
    if not width or not layers:
        empty = "The source's shape is not known yet."
        return HeatMap(name, title, unit, [0], [], [], run.last_step, empty, kind != "stem")
    columns = min(width, most)
    bounds = [column * width // columns for column in range(columns + 1)]
    removed = [[0] * columns for _ in range(layers)]
    when: list[list[int | None]] = [[None] * columns for _ in range(layers)]
    for event in run.events:
        if event.type == kind:
            _count(event, removed, when, width, columns)
    steps = run.events[-1].step if run.events else run.last_step
    return HeatMap(name, title, unit, bounds, removed, when, steps, "", kind != "stem")


def _count(event: Event, removed: list[list[int]], when: list[list[int | None]], width: int, columns: int) -> None:
    group = event.group
    layers = len(removed) if isinstance(group.removed, int) else min(len(removed), len(group.removed))
    for layer in range(layers):
        for index in group.indices(layer):
            # Bounds are column * width // columns: the column of an index, exactly.
            column = min(columns - 1, ((index + 1) * columns - 1) // width)
            removed[layer][column] += 1
            when[layer][column] = event.step
