"""Mini-groups: what one pruning step can remove (paper 3.1, Eqs. 4-6)."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import numpy as np

from megatron_prune.architecture import Architecture, Axis
from megatron_prune.parallel.partition import DEAD, IntArray, Partition, live

GroupType = Literal["attention", "ffn", "stem"]

#: In the order that breaks ties between equal scores.
GROUP_TYPES: tuple[GroupType, ...] = get_args(GroupType)


@dataclasses.dataclass(frozen=True)
class MiniGroup:
    """One removable group, in the source model's coordinates.

    Attributes:
        type: ``attention`` (query heads in every layer: one, or under ``--gqa-mode balanced`` one of every K/V
            head), ``ffn`` (a channel in every layer) or ``stem`` (one hidden channel of the whole model).
        removed: index per layer, a tuple of indices per layer where several go at once, or the one stem index.
    """

    type: GroupType
    removed: tuple[int | tuple[int, ...], ...] | int

    def indices(self, layer: int) -> tuple[int, ...]:
        """The source indices this group takes from a layer."""
        removed = self.removed if isinstance(self.removed, int) else self.removed[layer]
        return (removed,) if isinstance(removed, int) else removed

    @property
    def size(self) -> int:
        """Heads or channels that it takes from every layer."""
        return len(self.indices(0))

    def listed(self) -> list[int | list[int]] | int:
        """What a ledger line says of it: ``removed`` with lists for tuples."""
        if isinstance(self.removed, int):
            return self.removed
        return [index if isinstance(index, int) else list(index) for index in self.removed]


def units(group: GroupType, arch: Architecture, taken: int = 1) -> int:
    """Cost of a removal in units: output-group channels per block (a head ``head_dim``, an FFN channel 1, stem 2).

    Args:
        group: type.
        arch: the model.
        taken: heads or channels that go from every layer at once.
    """
    return {"attention": arch.head_dim, "ffn": 1, "stem": 2}[group] * taken


def remove(partition: Partition, group: MiniGroup) -> Partition:
    """Mark a group's slots dead: the logical removal. A KV head goes with its last query (paper B.4)."""
    if group.type == "stem":
        return dataclasses.replace(partition, stem=_without(partition.stem, group.indices(0)))
    layers = range(partition.source.num_layers)
    if group.type == "ffn":
        ffn = tuple(_without(partition.ffn[layer], group.indices(layer)) for layer in layers)
        return dataclasses.replace(partition, ffn=ffn)
    heads = tuple(_without(partition.heads[layer], group.indices(layer)) for layer in layers)
    kv_heads = []
    for layer in layers:
        kv_of_head = np.asarray(partition.source.kv_of_head(layer))
        needed = kv_of_head[live(heads[layer])]
        slots = partition.kv_heads[layer]
        kv_heads.append(_read_only(np.where(np.isin(slots, needed), slots, DEAD)))
    return dataclasses.replace(partition, heads=heads, kv_heads=tuple(kv_heads))


def newly_dead(before: Partition, after: Partition, axis: Axis, layer: int | None, tp_rank: int = 0) -> IntArray:
    """Physical elements of a tensor dimension that were live in ``before`` and are dead in ``after``."""
    old = before.elements(axis, layer, tp_rank)
    new = after.elements(axis, layer, tp_rank)
    return np.nonzero((old != DEAD) & (new == DEAD))[0]


def _without(slots: IntArray, units: tuple[int, ...]) -> IntArray:
    gone = np.isin(slots, units)
    assert gone.sum() == len(units), f"of units {units} not all are live"
    return _read_only(np.where(gone, DEAD, slots))


def _read_only(array: IntArray) -> IntArray:
    array.setflags(write=False)
    return array
