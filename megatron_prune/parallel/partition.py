"""Where every logical row and column of every tensor lives.

A :class:`Partition` lists, for each axis that pruning can shrink, the *physical slots* of that axis and which unit of
the **source** model each slot holds, or :data:`DEAD`. Removing a group marks its slots dead and changes no size;
compaction makes a new Partition with fewer slots. Everything that moves tensors (zeroing, compaction, checkpoints,
import, export) is a comparison of two such tables, which is why they agree with one another.

Shapes: ``ffn``, ``heads`` and ``kv_heads`` hold one array ``[tensor_parallel, slots]`` per layer, ``stem`` one array
``[slots]``: the stem is never split. Arrays are int64 and read-only. A KV head whose queries live on several ranks has
a slot on each of them; the lowest of these ranks is its *keeper*: it trains the head and the others follow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_prune.architecture import Architecture, Axis, TensorSpec

#: Marks a slot whose unit was removed; its weights and optimizer state are zero.
DEAD = -1

#: Axes that tensor parallelism splits; a tensor without any of them is whole on every rank.
SPLIT_AXES: tuple[Axis, ...] = ("ffn", "heads", "kv_heads", "vocab")

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
    def of(cls, source: Architecture, tensor_parallel: int = 1) -> Partition:
        """The unpruned model on so many tensor-parallel ranks."""
        layers = range(source.num_layers)
        whole = cls(
            source=source,
            stem=_frozen(np.arange(source.hidden_size)),
            ffn=tuple(_frozen(np.arange(source.ffn_hidden_size)[None]) for _ in layers),
            heads=tuple(_frozen(np.arange(source.num_attention_heads)[None]) for _ in layers),
            kv_heads=tuple(_frozen(np.arange(source.num_kv_heads(layer))[None]) for layer in layers),
        )
        return whole.spread(tensor_parallel)

    @property
    def tensor_parallel(self) -> int:
        """Ranks that share every layer."""
        return int(self.ffn[0].shape[0])

    def architecture(self) -> Architecture:
        """The live model: what remains when every dead slot is taken away."""
        return self._architecture

    @functools.cached_property
    def _architecture(self) -> Architecture:
        # Asked for several times a step; the arrays never change.
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
        """Source unit of every physical slot of an axis on one tensor-parallel rank, ``[slots]``.

        The vocabulary is cut into equal runs of tokens; what the last ranks have beyond it is dead.
        """
        if axis == "stem":
            return self.stem
        if axis == "head_dim":
            return np.arange(self.source.head_dim)
        if axis == "vocab":
            rows = -(-self.source.vocab_size // self.tensor_parallel)
            tokens = np.arange(tp_rank * rows, (tp_rank + 1) * rows)
            return np.where(tokens < self.source.vocab_size, tokens, DEAD)
        return self._per_layer(axis, layer)[tp_rank]

    def elements(self, axis: Axis, layer: int | None, tp_rank: int = 0) -> IntArray:
        """Source *element* of every physical element of a tensor dimension (a head spans ``head_dim`` elements)."""
        return self._spread_heads(axis, self.slots(axis, layer, tp_rank))

    def kept_elements(self, axis: Axis, layer: int | None, tp_rank: int = 0) -> IntArray:
        """Like :meth:`elements`, DEAD also where a lower rank is the keeper of the unit."""
        slots = self.slots(axis, layer, tp_rank)
        if axis == "kv_heads":
            lower = self._per_layer(axis, layer)[:tp_rank]
            slots = np.where(np.isin(slots, lower), DEAD, slots)
        return self._spread_heads(axis, slots)

    def live_elements(self, axis: Axis, layer: int | None) -> IntArray:
        """Source elements alive on any rank, ascending: element ``i`` of the logical dimension is the i-th of them."""
        if axis == "stem":
            return live(self.stem)
        if axis in ("vocab", "head_dim"):
            return np.arange(self.source.axis_size(axis))
        return self._spread_heads(axis, np.unique(live(self._per_layer(axis, layer))))

    def shape(self, spec: TensorSpec, tp_rank: int = 0) -> tuple[int, ...]:
        """Physical shape of a tensor on one tensor-parallel rank; the same on all of them."""
        return tuple(len(self.elements(axis, spec.layer, tp_rank)) for axis in spec.axes)

    def logical_shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """Shape of the live tensor, all ranks together."""
        return tuple(len(self.live_elements(axis, spec.layer)) for axis in spec.axes)

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

    def spread(self, tensor_parallel: int, quantum: int = 1) -> Partition:
        """Deal the live units out afresh to so many ranks, no more dead padding than the widths need.

        Units go to ranks in source order, counts differing by one at most; every rank gets the same width, a multiple
        of the quantum (heads: of one) but never wider than the source's. A KV head goes wherever one of its queries
        goes.

        Args:
            tensor_parallel: ranks that share every layer.
            quantum: alignment of ``stem`` and of a rank's ``ffn``, in channels (``--prune-align``).
        """
        # A larger one pads to the same widths, by way of arrays of its own size.
        quantum = min(quantum, max(self.source.hidden_size, self.source.ffn_hidden_size))
        layers = range(self.source.num_layers)
        ffn = [_dealt(live(self.ffn[layer]), tensor_parallel, quantum) for layer in layers]
        heads = [_dealt(live(self.heads[layer]), tensor_parallel, 1) for layer in layers]
        kv_heads = []
        for layer in layers:
            kv_of_head = np.asarray(self.source.kv_of_head(layer))
            kv_heads.append(_stacked([np.unique(kv_of_head[live(row)]) for row in heads[layer]], 1))
        return dataclasses.replace(
            self,
            stem=_frozen(_dealt(live(self.stem), 1, quantum)[0][: self.source.hidden_size]),
            ffn=tuple(_frozen(array[:, : -(-self.source.ffn_hidden_size // tensor_parallel)]) for array in ffn),
            heads=tuple(heads),
            kv_heads=tuple(kv_heads),
        )

    def compacted(self, quantum: int) -> Partition:
        """The same live units without superfluous dead slots: :meth:`spread` on as many ranks as now.

        Widths of stem and FFN never grow: the source's own, which need be no multiple of the quantum, stay until a
        multiple of it is reached.
        """
        after = self.spread(self.tensor_parallel, quantum)
        return dataclasses.replace(
            after,
            stem=_frozen(after.stem[: len(self.stem)]),
            ffn=tuple(_frozen(new[:, : old.shape[1]]) for old, new in zip(self.ffn, after.ffn, strict=True)),
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

    def _per_layer(self, axis: Axis, layer: int | None) -> IntArray:
        assert layer is not None
        return {"ffn": self.ffn, "heads": self.heads, "kv_heads": self.kv_heads}[axis][layer]

    def _spread_heads(self, axis: Axis, slots: IntArray) -> IntArray:
        if axis not in ("heads", "kv_heads"):
            return slots
        width = self.source.head_dim
        spread = slots[:, None] * width + np.arange(width)
        return np.where(slots[:, None] == DEAD, DEAD, spread).reshape(-1)


def is_split(spec: TensorSpec) -> bool:
    """True when every tensor-parallel rank holds its own part of the tensor, not a copy."""
    return any(axis in SPLIT_AXES for axis in spec.axes)


def live(array: IntArray) -> IntArray:
    """The source units a slot array holds, in ascending order, dead slots left out."""
    flat = array.reshape(-1)
    return np.sort(flat[flat != DEAD])


def _dealt(units: IntArray, ranks: int, quantum: int) -> IntArray:
    return _stacked(np.array_split(units, ranks), quantum)


def _stacked(rows: Sequence[IntArray], quantum: int) -> IntArray:
    """Rows of different length as one array, padded with dead slots to the next multiple of the quantum."""
    width = -(-max(len(row) for row in rows) // quantum) * quantum
    return _frozen(np.stack([np.concatenate([row, np.full(width - len(row), DEAD)]) for row in rows]))


def _frozen(array: npt.NDArray[Any]) -> IntArray:
    result = np.array(array, dtype=np.int64)
    result.setflags(write=False)
    return result
