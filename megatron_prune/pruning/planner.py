"""Choose the next mini-group: the least salient of three candidates (paper Eq. 9), within the budget.

Every function is pure and every rank that calls it with the same vectors gets the same answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from megatron_prune.architecture import Architecture
from megatron_prune.parallel.partition import Partition
from megatron_prune.pruning.groups import GROUP_TYPES, GroupType, MiniGroup, remove
from megatron_prune.pruning.saliency import FloatArray, SaliencyVectors

SaliencyNorm = Literal["mean", "sum", "params"]


@dataclasses.dataclass(frozen=True)
class Budget:
    """When to stop and what may not be removed.

    Attributes:
        target_params: prune until the model has at most this many parameters, or None.
        target_shape: prune each named type down to this width, or None. One of the two is set.
        floors: the least width of each type.
        axes: the types that may be pruned.
    """

    target_params: int | None
    target_shape: Mapping[GroupType, int] | None
    floors: Mapping[GroupType, int]
    axes: Sequence[GroupType] = GROUP_TYPES

    def met(self, arch: Architecture) -> bool:
        """True at the first shape at or under the target."""
        if self.target_params is not None:
            return arch.num_parameters() <= self.target_params
        assert self.target_shape is not None
        return all(width(kind, arch) <= goal for kind, goal in self.target_shape.items())

    def removable(self, kind: GroupType, arch: Architecture) -> bool:
        """True when one more removal of this type stays at or above its floor and target."""
        least = self.floors[kind]
        if self.target_shape is not None:
            least = self.target_shape.get(kind, width(kind, arch))
        return kind in self.axes and width(kind, arch) > least


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


def layer_minima(vectors: SaliencyVectors) -> FloatArray:
    """The least salient head and FFN channel of every layer; ties go to the lowest index.

    Returns:
        fp64 ``[layers, 4]``: head, its score, channel, its score.
    """
    heads, ffn = vectors.heads.argmin(axis=1), vectors.ffn.argmin(axis=1)
    return np.stack([heads, vectors.heads.min(axis=1), ffn, vectors.ffn.min(axis=1)], axis=1).astype(np.float64)


def cheapest_groups(minima: FloatArray, stem: FloatArray) -> dict[GroupType, tuple[MiniGroup, float]]:
    """The least salient group of each type and the sum of its element scores over all layers.

    Args:
        minima: see :func:`layer_minima`; of all layers.
        stem: ``[source hidden]``.
    """
    channel = int(stem.argmin())
    heads, head_scores, ffn, ffn_scores = minima.T
    return {
        "attention": (MiniGroup("attention", tuple(int(i) for i in heads)), float(head_scores.sum())),
        "ffn": (MiniGroup("ffn", tuple(int(i) for i in ffn)), float(ffn_scores.sum())),
        "stem": (MiniGroup("stem", channel), float(stem[channel])),
    }


def group_sizes(arch: Architecture) -> dict[GroupType, int]:
    """Scored elements in one group of each type over all layers: the divisors of ``mean``."""
    per_block = arch.num_attention_heads * arch.head_dim + arch.ffn_hidden_size
    return {
        "attention": arch.num_layers * arch.hidden_size * arch.head_dim,
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

    Args:
        vectors: sums in source coordinates, already struck-out groups at ``inf``.
        partition: the current placement.
        budget: targets, floors and admissible types.
        norm: ``mean`` compares mean scores per scored element (what the paper's Figure 5 shows), ``sum`` raw sums,
            ``params`` sums per removed parameter.
        gather: takes the minima of which only this stage's layers are true, gives those of all layers.

    Returns:
        The decision, or None when no type may be removed.
    """
    arch = partition.architecture()
    cheapest = cheapest_groups(gather(layer_minima(vectors)), vectors.stem)
    present = [kind for kind in GROUP_TYPES if width(kind, arch) > 1]
    after = {kind: remove(partition, cheapest[kind][0]) for kind in present}
    cost = {kind: arch.num_parameters() - after[kind].architecture().num_parameters() for kind in present}
    divisors: Mapping[GroupType, float] = {"attention": 1, "ffn": 1, "stem": 1}
    if norm == "mean":
        divisors = group_sizes(arch)
    elif norm == "params":
        divisors = cost
    scores = {kind: cheapest[kind][1] / divisors[kind] for kind in GROUP_TYPES if kind in divisors}
    candidates = [kind for kind in present if budget.removable(kind, arch)]
    candidates = _without_overshoot(candidates, cost, arch.num_parameters(), budget)
    if not candidates:
        return None
    best = min(candidates, key=lambda kind: scores[kind])  # min keeps the first of equals: the tie order
    return Decision(cheapest[best][0], scores, after[best])


def strike_out(vectors: SaliencyVectors, group: MiniGroup) -> SaliencyVectors:
    """The same vectors with one group out of reach, for the next choice from the same pass."""
    if group.type == "stem":
        stem = vectors.stem.copy()
        stem[group.index(0)] = np.inf
        return dataclasses.replace(vectors, stem=stem)
    struck: FloatArray = (vectors.heads if group.type == "attention" else vectors.ffn).copy()
    layers = range(struck.shape[0])
    struck[layers, [group.index(layer) for layer in layers]] = np.inf
    if group.type == "attention":
        return dataclasses.replace(vectors, heads=struck)
    return dataclasses.replace(vectors, ffn=struck)


def _without_overshoot(
    candidates: list[GroupType], cost: Mapping[GroupType, int], parameters: int, budget: Budget
) -> list[GroupType]:
    """Drop types whose removal falls below the target by more than the smallest available removal does.

    Near the budget a head would overshoot by millions of parameters where a channel lands on it.
    """
    if budget.target_params is None or len(candidates) < 2:
        return candidates
    room = parameters - budget.target_params
    smallest = min(cost[kind] for kind in candidates)
    allowed = max(0, smallest - room)
    return [kind for kind in candidates if max(0, cost[kind] - room) <= allowed]
