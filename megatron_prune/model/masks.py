"""Masks that multiply heads, FFN channels and hidden channels, for baselines that learn what to prune.

A mask of the hidden state multiplies what every norm reads, since whatever reads the hidden state reads it through a
norm. With masks of 0 and 1 the model is therefore the one in which the units at 0 do not exist.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


class UnitMask:
    """One mask per unit: random in training, settled elsewhere.

    Args:
        units: how many.
        device: where.

    Attributes:
        drawn: ``[units]`` fp32, a leaf that collects the gradient of training.
        settled: ``[units]`` fp32.
    """

    def __init__(self, units: int, device: torch.device) -> None:
        self.drawn = torch.ones(units, device=device, requires_grad=True)
        self.settled = torch.ones(units, device=device)
        self._live = (units, units)

    @torch.no_grad()
    def set(self, drawn: Tensor, settled: Tensor) -> None:
        """New values, in place; the gradient starts anew."""
        self.drawn.copy_(drawn)
        self.settled.copy_(settled)
        self.drawn.grad = None
        # At least 1: a norm divides by it.
        self._live = (max(1, int(drawn.count_nonzero())), max(1, int(settled.count_nonzero())))

    def value(self, training: bool, dtype: torch.dtype) -> Tensor:
        """The mask to multiply by, ``[units]``."""
        return (self.drawn if training else self.settled).to(dtype)

    def live(self, training: bool) -> int:
        """Units that are not masked out altogether."""
        return self._live[0 if training else 1]


@dataclasses.dataclass(frozen=True)
class ModelMasks:
    """The masks of a model; None where an axis has none.

    Attributes:
        heads: one per layer.
        ffn: one per layer.
        stem: of the hidden state.
    """

    heads: tuple[UnitMask, ...] | None = None
    ffn: tuple[UnitMask, ...] | None = None
    stem: UnitMask | None = None
