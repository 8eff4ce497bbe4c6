"""Where every logical row and column of every tensor lives.

A :class:`Partition` lists, for each axis that pruning can shrink, the *physical slots* of that axis and which unit of
the **source** model each slot holds, or :data:`DEAD`. Removing a group marks its slots dead and changes no size;
compaction makes a new Partition with fewer slots. Everything that moves tensors (zeroing, compaction, checkpoints,
import, export) is a comparison of two such tables, which is why they agree with one another.

Shapes: ``ffn``, ``heads`` and ``kv_heads`` hold one array ``[tensor_parallel, slots]`` per layer, ``stem`` one array
``[slots]``: the stem is never split. Arrays are int64 and read-only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_prune.architecture import Architecture, Axis, TensorSpec

#: Marks a slot whose unit was removed; its weights and optimizer state are zero.
DEAD = -1

IntArray = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class Partition:
    """Physical slots of every prunable axis, in source coordinates.

    Attributes:
        source: the model the run started from; slot values index its units.
        stem: ``[slots]`` hidden channels.
        ffn: per layer ``[tp, slots]`` FFN channels.
        heads: per layer ``[tp, slots]`` query heads.
        kv_heads: per layer ``[tp, slots]`` KV heads.
    """

    source: Architecture
    stem: IntArray
    ffn: tuple[IntArray, ...]
    heads: tuple[IntArray, ...]
    kv_heads: tuple[IntArray, ...]

    @classmethod
    def of(cls, source: Architecture) -> Partition:
        """The unpruned model on one tensor-parallel rank."""

        def whole(size: int) -> IntArray:
            return _frozen(np.arange(size)[None])

        layers = range(source.num_layers)
        return cls(
            source=source,
            stem=_frozen(np.arange(source.hidden_size)),
            ffn=tuple(whole(source.ffn_hidden_size) for _ in layers),
            heads=tuple(whole(source.num_attention_heads) for _ in layers),
            kv_heads=tuple(whole(source.num_kv_heads(layer)) for layer in layers),
        )

    def architecture(self) -> Architecture:
        """The live model: what remains when every dead slot is taken away."""
        kv_groups = []
        for layer, slots in enumerate(self.heads):
            kv_of_head = np.asarray(self.source.kv_of_head(layer))[live(slots)]
            kv_groups.append(tuple(int(n) for n in np.unique(kv_of_head, return_counts=True)[1]))
        return dataclasses.replace(
            self.source,
            hidden_size=len(live(self.stem)),
            ffn_hidden_size=len(live(self.ffn[0])),
            num_attention_heads=len(live(self.heads[0])),
            kv_groups=tuple(kv_groups),
        )

    def slots(self, axis: Axis, layer: int | None, tp_rank: int = 0) -> IntArray:
        """Source unit of every physical slot of an axis on one tensor-parallel rank, ``[slots]``."""
        if axis == "stem":
            return self.stem
        if axis in ("vocab", "head_dim"):
            return np.arange(self.source.axis_size(axis))
        assert layer is not None
        per_layer = {"ffn": self.ffn, "heads": self.heads, "kv_heads": self.kv_heads}[axis]
        return per_layer[layer][tp_rank]

    def elements(self, axis: Axis, layer: int | None, tp_rank: int = 0) -> IntArray:
        """Source *element* of every physical element of a tensor dimension (a head spans ``head_dim`` elements)."""
        slots = self.slots(axis, layer, tp_rank)
        if axis not in ("heads", "kv_heads"):
            return slots
        width = self.source.head_dim
        spread = slots[:, None] * width + np.arange(width)
        return np.where(slots[:, None] == DEAD, DEAD, spread).reshape(-1)

    def shape(self, spec: TensorSpec, tp_rank: int = 0) -> tuple[int, ...]:
        """Physical shape of a tensor on one tensor-parallel rank."""
        return tuple(len(self.elements(axis, spec.layer, tp_rank)) for axis in spec.axes)

    def dead_slots(self) -> int:
        """How many slots of any axis are dead padding."""
        arrays = (self.stem, *self.ffn, *self.heads)
        return int(sum((array == DEAD).sum() for array in arrays))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready placement (the source is recorded beside it, not in it)."""
        return {
            "stem": self.stem.tolist(),
            "ffn": [array.tolist() for array in self.ffn],
            "heads": [array.tolist() for array in self.heads],
            "kv_heads": [array.tolist() for array in self.kv_heads],
        }

    @classmethod
    def from_dict(cls, source: Architecture, data: dict[str, Any]) -> Partition:
        """Inverse of :meth:`to_dict`."""

        def arrays(name: str) -> tuple[IntArray, ...]:
            return tuple(_frozen(np.asarray(rows)) for rows in data[name])

        return cls(source, _frozen(np.asarray(data["stem"])), arrays("ffn"), arrays("heads"), arrays("kv_heads"))

    def same_placement(self, other: Partition) -> bool:
        """True when both put every unit in the same slot."""
        return self.to_dict() == other.to_dict()

    def compacted(self, quantum: int) -> Partition:
        """Drop dead slots, keeping live ones in order and every width a multiple of the quantum.

        Args:
            quantum: alignment of ``stem`` and ``ffn`` in channels (``--prune-align``); heads keep no dead slot.

        Returns:
            A Partition of the same live units. Widths are padded with dead slots up to the next multiple of
            ``quantum`` but never beyond what they are now.
        """

        def shrink(array: IntArray, multiple: int) -> IntArray:
            kept = array[array != DEAD]
            width = min(-(-len(kept) // multiple) * multiple, len(array))
            return np.concatenate([kept, np.full(width - len(kept), DEAD)])

        def shrink_layers(layers: Sequence[IntArray], multiple: int) -> tuple[IntArray, ...]:
            return tuple(_frozen(np.stack([shrink(row, multiple) for row in array])) for array in layers)

        return dataclasses.replace(
            self,
            stem=_frozen(shrink(self.stem, quantum)),
            ffn=shrink_layers(self.ffn, quantum),
            heads=shrink_layers(self.heads, 1),
            kv_heads=shrink_layers(self.kv_heads, 1),
        )

    def compaction_due(self, quantum: int) -> bool:
        """True when some width would shrink: enough is dead to pay for a physical removal."""
        after = self.compacted(quantum)
        before_sizes = [self.stem.size, *(a.size for a in (*self.ffn, *self.heads))]
        return before_sizes != [after.stem.size, *(a.size for a in (*after.ffn, *after.heads))]

    def kv_slot_of_head(self, layer: int, tp_rank: int = 0) -> tuple[int, ...]:
        """For every query-head slot the KV slot it reads, DEAD for a dead query slot.

        A dead query still has to be known as such: over a living KV head it would put out the mean of the values.
        """
        kv_of_head = self.source.kv_of_head(layer)
        position = {int(kv): slot for slot, kv in enumerate(self.kv_heads[layer][tp_rank]) if kv != DEAD}
        heads = self.heads[layer][tp_rank].tolist()
        return tuple(DEAD if head == DEAD else position[kv_of_head[head]] for head in heads)


def live(array: IntArray) -> IntArray:
    """The source units a slot array holds, in ascending order, dead slots left out."""
    flat = array.reshape(-1)
    return np.sort(flat[flat != DEAD])


def live_positions(elements: IntArray) -> IntArray:
    """For every physical element its position among the live ones in source order, or DEAD.

    This is the index that turns a live (logical) tensor dimension into the physical one.
    """
    return np.where(elements == DEAD, DEAD, np.searchsorted(live(elements), elements))


def moved(old: IntArray, new: IntArray) -> IntArray:
    """For every physical element of ``new`` the element of ``old`` that holds the same source element, or DEAD."""
    position = np.full(int(max(old.max(), new.max(), 0)) + 1, DEAD)
    alive = old != DEAD
    position[old[alive]] = np.nonzero(alive)[0]
    return np.where(new == DEAD, DEAD, position[new])


def _frozen(array: npt.NDArray[Any]) -> IntArray:
    result = np.array(array, dtype=np.int64)
    result.setflags(write=False)
    return result
