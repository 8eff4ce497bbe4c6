"""Repeat the removals of a saved ledger, whatever the layout, the schedule and the order of the axes.

Removals commute: the shape and the index sets that a ledger leaves do not depend on when each of its groups goes. The
next group of a type is the one after as many as are already gone, so nothing but the placement need be remembered: a
run that resumes, skips a step or goes back to a checkpoint is where its model is.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_prune.architecture import Architecture
from megatron_prune.errors import UserError
from megatron_prune.parallel.partition import Partition, live
from megatron_prune.pruning.groups import GROUP_TYPES, GroupType, MiniGroup, remove
from megatron_prune.pruning.ledger import Event, parse_ledger, shape_of
from megatron_prune.pruning.planner import Decision, width


@dataclasses.dataclass(frozen=True)
class Replay:
    """The removals of a ledger that fits a source; :func:`read_replay` makes one.

    Attributes:
        source: the model they remove from.
        events: in the order in which they are repeated.
    """

    source: Architecture
    events: tuple[Event, ...]

    def next(self, partition: Partition) -> Decision | None:
        """The next removal after those that are already done, or None at the end.

        Its scores are those of the ledger.
        """
        left = [positions[0] for positions in self._left(partition.architecture()).values() if positions]
        if not left:
            return None
        event = self.events[min(left)]
        scores = {kind: event.scores[kind] for kind in GROUP_TYPES if kind in event.scores}
        return Decision(event.group, scores, remove(partition, event.group))

    def check(self, partition: Partition) -> None:
        """Refuse a model from which anything else is gone than this ledger removes.

        Raises:
            UserError: so it is.
        """
        left = {position for positions in self._left(partition.architecture()).values() for position in positions}
        done = [event.group for position, event in enumerate(self.events) if position not in left]
        if not _same_units(partition, removed_at_once(self.source, done)):
            raise UserError(
                "--replay: the checkpoint has lost other groups than this ledger removes; give the ledger it began "
                "with, or another --save to start anew"
            )

    def end(self) -> dict[GroupType, int]:
        """The width of each type after the last event."""
        arch = self.after(len(self.events))
        return {kind: width(kind, arch) for kind in GROUP_TYPES}

    def first(self, true_of: Callable[[Architecture], bool]) -> int:
        """After how many events something that stays true is true of the shape; all of them where it never is."""
        return bisect.bisect_left(range(len(self.events)), True, key=lambda number: true_of(self.after(number)))

    def after(self, number: int) -> Architecture:
        """The shape after the first so many events."""
        return removed_at_once(self.source, [event.group for event in self.events[:number]]).architecture()

    def _left(self, arch: Architecture) -> Mapping[GroupType, Sequence[int]]:
        """Positions of the events of each type that are still to come."""
        return {
            kind: positions[bisect.bisect_left(gone, width(kind, self.source) - width(kind, arch) + 1) :]
            for kind, (positions, gone) in self._by_type.items()
        }

    @functools.cached_property
    def _by_type(self) -> Mapping[GroupType, tuple[Sequence[int], Sequence[int]]]:
        """Positions of each type's events, and how many heads or channels are gone after each."""
        found: dict[GroupType, tuple[Sequence[int], Sequence[int]]] = {}
        for kind in GROUP_TYPES:
            positions = [p for p, event in enumerate(self.events) if event.type == kind]
            found[kind] = positions, list(itertools.accumulate(self.events[p].group.size for p in positions))
        return found


def read_replay(path: Path, source: Architecture, order: Sequence[str] | None = None) -> Replay:
    """Read a ledger to repeat.

    Args:
        path: of the ``ledger.jsonl``.
        source: the model of this run.
        order: types one after the other, each in the ledger's own order; None keeps the order of the ledger.

    Raises:
        UserError: it cannot be read, is empty, or does not fit the source or the order.
    """
    try:
        events = parse_ledger(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"--replay {path} is no ledger ({error}); give the ledger.jsonl of a run") from error
    misfit = next(_misfits(events, source), None)
    if misfit is not None:
        raise UserError(f"--replay {path} does not fit the source: {misfit}; give a ledger that began with this source")
    if order is not None:
        missing = {event.type for event in events} - set(order)
        if missing:
            raise UserError(
                f"--trajectory {','.join(order)} lacks {missing.pop()}, which --replay {path} removes: add it"
            )
        events.sort(key=lambda event: order.index(event.type))
    return Replay(source, tuple(events))


def removed_at_once(source: Architecture, groups: Sequence[MiniGroup]) -> Partition:
    """What is left of a source without all of some groups, on one rank."""
    partition = Partition.of(source)
    for kind in GROUP_TYPES:
        own = [group for group in groups if group.type == kind]
        layers = range(1 if kind == "stem" else source.num_layers)
        gone = tuple(tuple(index for group in own for index in group.indices(layer)) for layer in layers)
        if own:
            partition = remove(partition, MiniGroup(kind, gone))
    return partition


def _misfits(events: Sequence[Event], source: Architecture) -> Iterator[str]:
    """Why events cannot have been removed from a source; the first reason is the clearest."""
    if not events:
        yield "it is empty"
        return
    for kind in GROUP_TYPES:
        own = [event for event in events if event.type == kind]
        layers = 1 if kind == "stem" else source.num_layers
        for event in own:
            given = 1 if isinstance(event.removed, int) else len(event.removed)
            if isinstance(event.removed, int) != (kind == "stem") or given != layers:
                yield f"event {event.event} names {kind} of {given} layer(s), not of {layers}"
                return
        for layer in range(layers):
            indices = [index for event in own for index in event.group.indices(layer)]
            if len(set(indices)) < len(indices) or not all(0 <= index < width(kind, source) for index in indices):
                yield f"{kind} of layer {layer} goes twice or is beyond the source's {width(kind, source)}"
            if len(indices) >= width(kind, source) or len(indices) != sum(event.group.size for event in own):
                yield f"it removes all of {kind}, or not as many from every layer"
    last, after = events[-1], removed_at_once(source, [event.group for event in events]).architecture()
    if shape_of(after) != dict(last.shape) or after.num_parameters() != last.parameters:
        yield f"it ends at {last.parameters:,} parameters, where this source would have {after.num_parameters():,}"


def _same_units(first: Partition, second: Partition) -> bool:
    pairs = [(first.stem, second.stem)]
    pairs += [*zip(first.ffn, second.ffn, strict=True), *zip(first.heads, second.heads, strict=True)]
    return all(np.array_equal(live(one), live(other)) for one, other in pairs)
