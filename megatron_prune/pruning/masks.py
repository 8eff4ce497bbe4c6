"""Learned masks under constraints: the pruning of ShearedLlama (Xia et al. 2023), one of the paper's baselines.

Every head, FFN channel and hidden channel has a mask drawn from a hard-concrete distribution (Louizos et al. 2018): a
stretched sigmoid of its logit and of logistic noise, cut off at 0 and 1, so that exact zeros and ones have a gradient.
Each axis (of every layer; the stem is one for all) has a constraint, the expected share of open masks, and two Lagrange
multipliers that rise while it does not hold.

Steps that are few do not bring every mask to 0 or 1. After most of them, therefore, the masks are fixed and led there:
those of units that will go are closed one after another, the others opened little by little, so that at the last step
the masked model is the sliced one.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from megatron_prune.architecture import Architecture
from megatron_prune.parallel.partition import Partition
from megatron_prune.pruning.groups import GROUP_TYPES, GroupType, MiniGroup, remove
from megatron_prune.pruning.planner import width

TEMPERATURE: Final = 2 / 3
LOW, HIGH = -0.1, 1.1  # the sigmoid is stretched to this range, then cut off
FIRST_LOGIT: Final = 2.5  # nearly all masks begin open: 98 % of the draws, and eight of ten of them at 1
#: Part of the steps over which the constraints move from the source's shape to the target.
WARMUP: Final = 0.5
#: Part of the steps in which masks are learned; in the others they are led to 0 and 1.
LEARN: Final = 0.8
_MOMENTS: Final = ("exp_avg", "exp_avg_sq")  # as torch's Adam calls them
_MOST_DIGITS: Final = 12  # of a number of steps


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Masks in [0, 1] from their logits and draws from (0, 1) of the same shape; differentiable in the logits."""
    noise = uniform.log() - (-uniform).log1p()
    return _cut(torch.sigmoid((noise + logits) / TEMPERATURE))


def settled(logits: Tensor) -> Tensor:
    """The masks without noise (Louizos et al., Eq. 13)."""
    return _cut(torch.sigmoid(logits))


def open_probability(logits: Tensor) -> Tensor:
    """Probability that a drawn mask is not 0."""
    return torch.sigmoid(logits - TEMPERATURE * float(np.log(-LOW / HIGH)))


def penalty(excess: Tensor, linear: Tensor, quadratic: Tensor) -> Tensor:
    """The Lagrangian's terms: how far each constraint's share is above its target, weighed by its multipliers."""
    return (linear * excess + quadratic * excess.square()).sum()


def _cut(stretched: Tensor) -> Tensor:
    return (stretched * (HIGH - LOW) + LOW).clamp(0, 1)


@dataclasses.dataclass(frozen=True)
class Axis:
    """The masks of one axis, in the source's coordinates.

    Attributes:
        logits: ``[layers, units]`` (stem: ``[1, hidden]``), fp32, trained.
        linear: ``[layers]`` multipliers, trained upwards.
        quadratic: ``[layers]``, likewise.
        keep: units to keep in every layer.
    """

    logits: Tensor
    linear: Tensor
    quadratic: Tensor
    keep: int

    def excess(self, progress: float) -> Tensor:
        """Of every layer the expected share of open masks less what it should be ``progress`` of the way, 0 to 1."""
        target = 1 - min(1.0, progress) * (1 - self.keep / self.logits.shape[1])
        return open_probability(self.logits).mean(dim=1) - target

    def kept(self) -> Tensor:
        """Bool like the logits: in every layer the largest, as many as are to be kept; of equals the first."""
        return self._largest(self.keep)

    def led(self, way: float) -> Tensor:
        """The masks without noise, ``way`` of the way to 0 and 1: at 1 they are 1 where :meth:`kept`, else 0."""
        masks, kept = settled(self.logits.detach()), self.kept()
        open_units = self.logits.shape[1] - math.ceil(way * (self.logits.shape[1] - self.keep))
        masks = torch.where(kept, masks.lerp(torch.ones_like(masks), way), masks)
        return masks.masked_fill(~self._largest(open_units), 0.0)

    def _largest(self, count: int) -> Tensor:
        order = torch.argsort(self.logits.detach(), dim=1, descending=True, stable=True)
        return torch.zeros_like(self.logits, dtype=torch.bool).scatter_(1, order[:, :count], True)


class MaskLearner:
    """Masks of all axes that are to shrink, and their optimizer.

    Args:
        source: the model.
        target: width to reach, by type; a type that keeps its width has no masks.
        lr: of logits and multipliers.
        steps: until the cut, 2 or more: most of them learn, the last ones lead to 0 and 1.
        seed: of the noise.
        device: where the masks live.
    """

    def __init__(
        self,
        source: Architecture,
        target: Mapping[GroupType, int],
        lr: float,
        steps: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._learning = int(LEARN * steps)
        self._leading = steps - self._learning
        self._seed = seed
        self.axes = {
            kind: _axis(1 if kind == "stem" else source.num_layers, width(kind, source), target[kind], device)
            for kind in GROUP_TYPES
            if target[kind] < width(kind, source)
        }
        axes = self.axes.values()
        multipliers = [tensor for axis in axes for tensor in (axis.linear, axis.quadratic)]
        self._descent = torch.optim.Adam([axis.logits for axis in axes], lr=lr)
        self._ascent = torch.optim.Adam(multipliers, lr=lr, maximize=True)

    def masks(self, step: int) -> dict[GroupType, Tensor]:
        """The masks of a step, a function of the logits, the seed and the step.

        While they learn they are drawn, and differentiable in the logits; then they are :meth:`settled`.
        """
        if step >= self._learning:
            return self.settled(step)
        noise = np.random.Generator(np.random.Philox(key=[self._seed, step]))
        drawn: dict[GroupType, Tensor] = {}
        for kind, axis in self.axes.items():
            uniform = torch.from_numpy(noise.uniform(1e-6, 1 - 1e-6, size=axis.logits.shape)).to(axis.logits)
            drawn[kind] = draw(axis.logits, uniform)
        return drawn

    def settled(self, step: int) -> dict[GroupType, Tensor]:
        """The masks of a step without noise, without gradient."""
        way = min(1.0, max(0, step + 1 - self._learning) / self._leading)
        return {kind: axis.led(way) if way else settled(axis.logits.detach()) for kind, axis in self.axes.items()}

    def learn(self, step: int, masks: Mapping[GroupType, Tensor], gradients: Mapping[GroupType, Tensor]) -> None:
        """One step of logits and multipliers; nothing once the masks are fixed.

        Args:
            step: which, from 0.
            masks: of :meth:`masks`, their graph intact.
            gradients: of the loss with respect to them.
        """
        if step >= self._learning:
            return
        self._descent.zero_grad()
        self._ascent.zero_grad()
        progress = (step + 1) / (WARMUP * (self._learning + self._leading))
        total = torch.stack(
            [penalty(axis.excess(progress), axis.linear, axis.quadratic) for axis in self.axes.values()]
        ).sum()
        for kind, mask in masks.items():
            total = total + (mask * gradients[kind]).sum()
        total.backward()
        self._descent.step()
        self._ascent.step()

    def state(self) -> str:
        """All that has been learned, as text: steps of the optimizers, units of each axis, the values to the bit."""
        steps, values = 0, list[Tensor]()
        for optimizer, tensor in self._trained():
            entry = optimizer.state.get(tensor, {})
            steps = int(entry.get("step", 0))
            values += [tensor, *(entry.get(moment, torch.zeros_like(tensor)) for moment in _MOMENTS)]
        flat = torch.cat([value.detach().cpu().reshape(-1) for value in values]).numpy()
        return f"{steps}:{self._units()}:{base64.b64encode(flat.astype('<f4').tobytes()).decode('ascii')}"

    def restore(self, state: str) -> None:
        """Take up what :meth:`state` has written.

        Raises:
            ValueError: it is no such text, or that of masks for other axes.
        """
        steps, _, rest = state.partition(":")
        axes, _, packed = rest.partition(":")
        if axes != self._units():
            raise ValueError(f"its masks are of {axes[:99] or 'nothing'}, and now {self._units()} shrink")
        flat = np.frombuffer(base64.b64decode(packed, validate=True), "<f4")
        trained = self._trained()
        sizes = [tensor.numel() for _, tensor in trained for _ in range(1 + len(_MOMENTS))]
        if not (steps.isascii() and steps.isdigit() and len(steps) <= _MOST_DIGITS):
            raise ValueError("its masks have learned for no number of steps")
        if flat.size != sum(sizes) or not np.isfinite(flat).all():
            raise ValueError("its masks are too few, too many or no numbers")
        parts = iter(torch.from_numpy(flat.astype(np.float32)).split(sizes))
        for optimizer, tensor in trained:
            with torch.no_grad():
                tensor.copy_(next(parts).view_as(tensor))
            moments = {moment: next(parts).view_as(tensor).to(tensor.device) for moment in _MOMENTS}
            if int(steps):
                optimizer.state[tensor] = {"step": torch.tensor(float(steps)), **moments}

    def _trained(self) -> list[tuple[torch.optim.Adam, Tensor]]:
        """Every tensor that learns, with its optimizer."""
        return [
            pair
            for axis in self.axes.values()
            for pair in ((self._descent, axis.logits), (self._ascent, axis.linear), (self._ascent, axis.quadratic))
        ]

    def _units(self) -> str:
        return ",".join(f"{kind}={axis.logits.numel()}" for kind, axis in self.axes.items())

    def removals(self, partition: Partition) -> list[tuple[MiniGroup, float, Partition]]:
        """What leaves exactly the target: groups, the mean mask of each, and the placement after it.

        Units go in the order of their masks, the smallest first, one of every layer at a time.
        """
        result = []
        for kind, axis in self.axes.items():
            logits = axis.logits.detach().masked_fill(axis.kept(), torch.inf)
            order = torch.argsort(logits, dim=1, stable=True)[:, : logits.shape[1] - axis.keep].cpu()
            masks = settled(axis.logits.detach()).cpu()
            for units in order.T:
                group = MiniGroup(kind, int(units[0]) if kind == "stem" else tuple(units.tolist()))
                partition = remove(partition, group)
                result.append((group, float(masks.gather(1, units[:, None]).mean()), partition))
        return result


def _axis(layers: int, units: int, keep: int, device: torch.device) -> Axis:
    def trained(*shape: int, value: float) -> Tensor:
        return torch.full(shape, value, device=device, requires_grad=True)

    return Axis(trained(layers, units, value=FIRST_LOGIT), trained(layers, value=0.0), trained(layers, value=0.0), keep)
