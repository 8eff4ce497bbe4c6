"""ShearedLlama inside the training loop: masks are learned beside the weights, then decide every removal at once.

The masks of a step are drawn once, the same for all its micro-batches and all copies of the model; what the loss says
of them is collected over both and read where saliency is read, before the optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

from megatron_prune.architecture import Architecture
from megatron_prune.errors import UserError
from megatron_prune.model.masks import ModelMasks, UnitMask
from megatron_prune.parallel.collectives import sum_over_stage_
from megatron_prune.parallel.mesh import Mesh
from megatron_prune.pruning.groups import GroupType
from megatron_prune.pruning.masks import Axis, MaskLearner
from megatron_prune.pruning.planner import Decision
from megatron_prune.training.engine import PruningEngine

#: How the text begins that a checkpoint keeps: then the step its masks are drawn for, and what has been learned.
MEMORY: Final = "masks"


def take_up(learner: MaskLearner, memory: str) -> int:
    """Give a learner what a checkpoint holds of its masks; returns the step that they are to be drawn for.

    Raises:
        UserError: the checkpoint holds none, or those of another target.
    """
    step, _, state = memory.removeprefix(f"{MEMORY}:").partition(":")
    try:
        learner.restore(state)
        return int(step)
    except ValueError as error:
        raise UserError(
            f"--sheared-iters cannot go on from this checkpoint: {error}; give the --target-shape it was begun with, "
            "or start anew with another --save"
        ) from error


class Shears:
    """Learns masks for some steps, then cuts to the target; takes the place of a pruner in the loop.

    Args:
        engine: the model, unpruned, neither tensor nor pipeline parallel.
        mesh: groups.
        learner: the masks.
        steps: to learn for.
    """

    def __init__(self, engine: PruningEngine, mesh: Mesh, learner: MaskLearner, steps: int) -> None:
        self._engine = engine
        self._mesh = mesh
        self._learner = learner
        self._steps = steps
        self._units = {kind: _unit_masks(axis, mesh.device) for kind, axis in learner.axes.items()}
        self._drawn: Mapping[GroupType, Tensor] = {}
        self._pending: list[Decision] = []
        self._done = False
        heads, ffn, stem = (self._units.get(kind) for kind in ("attention", "ffn", "stem"))
        engine.set_masks(ModelMasks(heads, ffn, None if stem is None else stem[0]))
        self._draw(0)

    @property
    def met(self) -> bool:
        """True once everything is removed."""
        return self._done

    def met_by(self, arch: Architecture) -> bool:
        """As :attr:`met`: there is no way back to an earlier shape."""
        return self._done

    def pace_from(self, step: int, spent: int) -> None:
        """Nothing: masks have no pace."""

    @property
    def memory(self) -> str:
        """What a checkpoint needs to hold for the masks to go on as they would have."""
        return f"{MEMORY}:{self._step}:{self._learner.state()}"

    def remember(self, memory: str) -> None:
        """Take up such a text; an empty one is that of a start.

        Raises:
            UserError: it is none, or of masks for another target.
        """
        if memory:
            self._draw(take_up(self._learner, memory))

    @property
    def chosen(self) -> int:
        """Groups chosen and not carried out."""
        return len(self._pending)

    def due(self, step: int, spent: int) -> bool:
        """True: every step teaches the masks."""
        return True

    def decide(self, step: int, spent: int, doubted: Callable[[Decision], bool]) -> None:
        """Learn from the gradients of a step's masks; at the last step choose what goes.

        A step whose gradients are not finite teaches nothing, as it does not change the weights.

        Args:
            step: optimizer step, from 0.
            spent: units spent so far.
            doubted: not asked: no single gradient decides.
        """
        gradients = {kind: self._gradient(masks) for kind, masks in self._units.items()}
        if not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
            self._draw(step)  # the same masks, their gradients forgotten
            return
        self._learner.learn(step, self._drawn, gradients)
        if step + 1 >= self._steps:
            self._pending = [
                Decision(group, {group.type: mask}, after)
                for group, mask, after in self._learner.removals(self._engine.partition)
            ]
        self._draw(step + 1)

    def commit(self) -> Iterator[Decision]:
        """Cut, if it is time, and leave the model without masks; yields after each removal."""
        decisions, self._pending = self._pending, []
        if decisions:
            self._engine.set_masks(ModelMasks())
            self._done = True
        for decision in decisions:
            self._engine.remove(decision.partition)
            yield decision

    def discard(self) -> None:
        """The step was skipped: choose after the next one."""
        self._pending = []

    def _draw(self, step: int) -> None:
        self._step = step
        self._drawn, settled = self._learner.masks(step), self._learner.settled(step)
        for kind, units in self._units.items():
            for layer, unit in enumerate(units):
                unit.set(self._drawn[kind][layer], settled[kind][layer])

    def _gradient(self, units: tuple[UnitMask, ...]) -> Tensor:
        """``[layers, units]`` of the mean loss over micro-batches and copies."""
        collected = [unit.drawn.grad for unit in units]
        gradient = torch.stack([grad for grad in collected if grad is not None])
        assert len(gradient) == len(units), "every mask multiplies something"
        sum_over_stage_(gradient, self._mesh)
        return gradient / self._mesh.dp_size


def _unit_masks(axis: Axis, device: torch.device) -> tuple[UnitMask, ...]:
    layers, units = axis.logits.shape
    return tuple(UnitMask(units, device) for _ in range(layers))
