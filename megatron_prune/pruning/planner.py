"""Choose the next mini-group: the least salient of three candidates (paper Eq. 9), within the budget.

Every function is pure and every rank that calls it with the same vectors gets the same answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from megatron_prune.architecture import Architecture
from megatron_prune.config.schema import GqaMode, PruneCost
from megatron_prune.parallel.partition import Partition
from megatron_prune.pruning.cost import Costs
from megatron_prune.pruning.gqa import heads_at_once, least_heads
from megatron_prune.pruning.groups import GROUP_TYPES, GroupType, MiniGroup, remove
from megatron_prune.pruning.saliency import FloatArray, SaliencyVectors

#: How groups of different size are compared: per scored element, plainly, or per unit of a cost freed.
SaliencyNorm = Literal["mean", "sum"] | PruneCost


@dataclasses.dataclass(frozen=True)
class Budget:
    """When to stop and what may be removed until then.

    Attributes:
        target_params: prune until the model has at most this many parameters, or None.
        target_shape: prune each named type down to this width, or None.
        floors: the least width of each type.
        axes: the types that may be pruned.
        limit: prune until this cost is at most so much, or None. One of the three targets is set, or ``last_shape``.
        costs: what shapes cost.
        gqa_mode: which heads go together.
        align: once a target other than a shape is met, each type goes on to a multiple of so many channels.
        order: types that shrink one after the other, or None for all together.
        last_shape: where a replayed ledger ends; pruning stops there at the latest.
    """

    target_params: int | None
    target_shape: Mapping[GroupType, int] | None
    floors: Mapping[GroupType, int]
    axes: Sequence[GroupType] = GROUP_TYPES
    limit: tuple[PruneCost, float] | None = None
    costs: Costs = Costs()
    gqa_mode: GqaMode = "cluster"
    align: int = 1
    order: Sequence[GroupType] | None = None
    last_shape: Mapping[GroupType, int] | None = None

    def met(self, arch: Architecture) -> bool:
        """True at the first shape at or under the target whose widths are aligned."""
        if self.last_shape is not None and _within(arch, self.last_shape):
            return True
        return self.reached(arch) and not any(self.misaligned(kind, arch) for kind in self.axes)

    def reached(self, arch: Architecture) -> bool:
        """True when a shape is at or under the target, aligned or not."""
        if self.target_shape is not None:
            return _within(arch, self.target_shape)
        excess = self.excess(arch)
        return excess is not None and excess <= 0

    def excess(self, arch: Architecture) -> float | None:
        """What a shape costs above the target, in the target's own measure; None where a shape is the target."""
        cost = self.measure
        if cost is None:
            return None
        most = self.target_params if self.limit is None else self.limit[1]
        assert most is not None
        return self.costs.of(cost, arch) - most

    @property
    def measure(self) -> PruneCost | None:
        """What the target counts; None where a shape, or a replayed ledger alone, is the target."""
        if self.limit is not None:
            return self.limit[0]
        return None if self.target_params is None else "params"

    def misaligned(self, kind: GroupType, arch: Architecture) -> bool:
        """True when a type's channels are no multiple of ``align``."""
        channels = width(kind, arch) * (arch.head_dim if kind == "attention" else 1)
        return channels % self.align != 0

    def removable(self, kind: GroupType, arch: Architecture, taken: int = 1) -> bool:
        """True when one more removal of this type, of so many heads or channels, stays at or above floor and target.

        Past the target only types that are not aligned yet may shrink.
        """
        if kind not in self.axes or width(kind, arch) - taken < self._least(kind, arch):
            return False
        if self.order is not None and kind != next((k for k in self.order if self._unfinished(k, arch)), None):
            return False
        return not self.reached(arch) or self.misaligned(kind, arch)

    def spare(self, kind: GroupType, arch: Architecture) -> int:
        """Heads or channels of a type above its floor."""
        return width(kind, arch) - self._least(kind, arch)

    def _least(self, kind: GroupType, arch: Architecture) -> int:
        if self.target_shape is not None:
            return self.target_shape.get(kind, width(kind, arch))
        return self.floors[kind]

    def _unfinished(self, kind: GroupType, arch: Architecture) -> bool:
        return kind in self.axes and self.spare(kind, arch) > 0


@dataclasses.dataclass(frozen=True)
class Decision:
    """One choice.

    Attributes:
        group: what to remove.
        scores: score of each type's cheapest group at this moment, also of types that were no candidates.
        partition: the placement after the logical removal.
    """

    group: MiniGroup
    scores: Mapping[GroupType, float]
    partition: Partition


def width(kind: GroupType, arch: Architecture) -> int:
    """Live width of a type's axis: heads, FFN channels or hidden channels."""
    return {"attention": arch.num_attention_heads, "ffn": arch.ffn_hidden_size, "stem": arch.hidden_size}[kind]


def _within(arch: Architecture, shape: Mapping[GroupType, int]) -> bool:
    return all(width(kind, arch) <= most for kind, most in shape.items())


def layer_minima(vectors: SaliencyVectors, partition: Partition, mode: GqaMode) -> FloatArray:
    """The least salient heads and FFN channel of every layer; ties go to the lowest index.

    Returns:
        fp64 ``[layers, heads at once + 3]``: heads, the sum of their scores, channel, its score.
    """
    heads, ffn = least_heads(vectors.heads, partition, mode), vectors.ffn.argmin(axis=1)
    head_scores = np.take_along_axis(vectors.heads, heads, axis=1).sum(axis=1)
    columns = [*heads.T, head_scores, ffn, vectors.ffn.min(axis=1)]
    return np.stack(columns, axis=1).astype(np.float64)


def cheapest_groups(minima: FloatArray, stem: FloatArray) -> dict[GroupType, tuple[MiniGroup, float]]:
    """The least salient group of each type and the sum of its element scores over all layers.

    Args:
        minima: see :func:`layer_minima`; of all layers.
        stem: ``[source hidden]``.
    """
    channel = int(stem.argmin())
    heads, (head_scores, ffn, ffn_scores) = minima[:, :-3].astype(int).tolist(), minima[:, -3:].T
    taken = [row[0] if len(row) == 1 else tuple(row) for row in heads]
    return {
        "attention": (MiniGroup("attention", tuple(taken)), float(head_scores.sum())),
        "ffn": (MiniGroup("ffn", tuple(int(i) for i in ffn)), float(ffn_scores.sum())),
        "stem": (MiniGroup("stem", channel), float(stem[channel])),
    }


def group_sizes(arch: Architecture, heads: int = 1) -> dict[GroupType, int]:
    """Scored elements in one group of each type over all layers: the divisors of ``mean``.

    Args:
        arch: the live model.
        heads: query heads that go together.
    """
    per_block = arch.num_attention_heads * arch.head_dim + arch.ffn_hidden_size
    return {
        "attention": arch.num_layers * arch.hidden_size * arch.head_dim * heads,
        "ffn": arch.num_layers * arch.hidden_size,
        "stem": arch.num_layers * per_block,
    }


def choose(
    vectors: SaliencyVectors,
    partition: Partition,
    budget: Budget,
    norm: SaliencyNorm,
    gather: Callable[[FloatArray], FloatArray] = lambda minima: minima,
) -> Decision | None:
    """Pick the least salient admissible group.

    A type whose group frees nothing of the cost that is compared by has no score then, and is no candidate while
    another one has; where none has, means are compared.

    Args:
        vectors: sums in source coordinates, already struck-out groups at ``inf``.
        partition: the current placement.
        budget: targets, floors and admissible types.
        norm: ``mean`` compares mean scores per scored element (what the paper's Figure 5 shows), ``sum`` raw sums,
            the others sums per unit of cost freed.
        gather: takes the minima of which only this stage's layers are true, gives those of all layers.

    Returns:
        The decision, or None when no type may be removed.
    """
    arch = partition.architecture()
    heads = heads_at_once(partition, budget.gqa_mode)
    cheapest = cheapest_groups(gather(layer_minima(vectors, partition, budget.gqa_mode)), vectors.stem)
    taken: Mapping[GroupType, int] = {"attention": heads, "ffn": 1, "stem": 1}
    present = [kind for kind in GROUP_TYPES if width(kind, arch) > taken[kind]]
    after = {kind: remove(partition, cheapest[kind][0]) for kind in present}
    shapes = {kind: partition.architecture() for kind, partition in after.items()}
    candidates = [kind for kind in present if budget.removable(kind, arch, taken[kind])]
    candidates = _without_overshoot(candidates, arch, shapes, budget)
    divisors = _divisors(norm, arch, shapes, budget.costs, heads)
    if not any(kind in divisors for kind in candidates):
        divisors = _divisors("mean", arch, shapes, budget.costs, heads)
    scores = {kind: cheapest[kind][1] / divisors[kind] for kind in GROUP_TYPES if kind in divisors}
    candidates = [kind for kind in candidates if kind in scores]
    if not candidates:
        return None
    best = min(candidates, key=lambda kind: scores[kind])  # min keeps the first of equals: the tie order
    return Decision(cheapest[best][0], scores, after[best])


def _divisors(
    norm: SaliencyNorm, arch: Architecture, shapes: Mapping[GroupType, Architecture], costs: Costs, heads: int
) -> Mapping[GroupType, float]:
    """What the sum of a group of each type is divided by; types are missing that free nothing."""
    if norm == "sum":
        return dict.fromkeys(GROUP_TYPES, 1)
    if norm == "mean":
        return group_sizes(arch, heads)
    freed = {kind: costs.freed(norm, arch, after) for kind, after in shapes.items()}
    return {kind: amount for kind, amount in freed.items() if amount > 0}


def strike_out(vectors: SaliencyVectors, group: MiniGroup) -> SaliencyVectors:
    """The same vectors with one group out of reach, for the next choice from the same pass."""
    if group.type == "stem":
        stem = vectors.stem.copy()
        stem[list(group.indices(0))] = np.inf
        return dataclasses.replace(vectors, stem=stem)
    struck: FloatArray = (vectors.heads if group.type == "attention" else vectors.ffn).copy()
    for layer in range(struck.shape[0]):
        struck[layer, list(group.indices(layer))] = np.inf
    if group.type == "attention":
        return dataclasses.replace(vectors, heads=struck)
    return dataclasses.replace(vectors, ffn=struck)


def _without_overshoot(
    candidates: list[GroupType], arch: Architecture, shapes: Mapping[GroupType, Architecture], budget: Budget
) -> list[GroupType]:
    """Drop types whose removal falls below the target by more than the smallest available removal does.

    Near the budget a head would overshoot by millions of parameters where a channel lands on it. A measured cost may
    hang on one type alone: the others are not used up for what they cannot save.
    """
    room, measure = budget.excess(arch), budget.measure
    if room is None or measure is None or room <= 0 or len(candidates) < 2:  # past the target all that remains is due
        return candidates
    now = budget.costs.of(measure, arch)
    cost = {kind: now - budget.costs.of(measure, shapes[kind]) for kind in candidates}
    allowed = max(0.0, min(cost.values()) - room)
    close = [kind for kind in candidates if max(0.0, cost[kind] - room) <= allowed]
    if budget.limit is not None and sum(cost[kind] * budget.spare(kind, arch) for kind in close) < room:
        return candidates
    return close
