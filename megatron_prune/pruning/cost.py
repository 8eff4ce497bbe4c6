"""What a shape costs: parameters, FLOPs, measured milliseconds, KV cache. The currency of budgets and choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_prune.architecture import Architecture
from megatron_prune.config.schema import PruneCost


@dataclasses.dataclass(frozen=True, eq=False)
class LatencyTable:
    """Milliseconds to decode one token, measured at the corners of a grid of shapes.

    Between the corners it is interpolated linearly along each axis, which is exact where time is proportional to the
    bytes of a matrix (a width times a width). Outside the grid the nearest cell goes on.

    Attributes:
        hidden: hidden sizes, ascending, at least two unless the axis never shrinks.
        ffn: FFN widths.
        heads: query heads.
        milliseconds: fp64 ``[hidden, ffn, heads]``, never less for a wider shape.
        about: what of the settings it depends on, JSON-ready.
    """

    hidden: tuple[int, ...]
    ffn: tuple[int, ...]
    heads: tuple[int, ...]
    milliseconds: npt.NDArray[np.float64]
    about: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        knots: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
        measured: npt.NDArray[np.float64],
        about: Mapping[str, Any],
    ) -> LatencyTable:
        """A table of measurements, each lowered to the least of all wider shapes: a narrower one is never slower.

        Lowered and not the others raised, because what disturbs a measurement only ever adds to it.
        """
        times = np.flip(measured)
        for axis in range(3):
            times = np.minimum.accumulate(times, axis=axis)
        return cls(*knots, np.flip(times), about)

    def milliseconds_of(self, hidden: int, ffn: int, heads: int) -> float:
        """Milliseconds a token of a shape."""
        values = self.milliseconds
        for knots, width in ((self.hidden, hidden), (self.ffn, ffn), (self.heads, heads)):
            values = _between(values, knots, width)  # drops the first axis
        return float(values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "hidden": list(self.hidden),
            "ffn": list(self.ffn),
            "heads": list(self.heads),
            "milliseconds": self.milliseconds.tolist(),
            "about": dict(self.about),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyTable:
        """Inverse of :meth:`to_dict`.

        Raises:
            KeyError, TypeError, ValueError: the data is no such table.
        """
        knots = tuple(tuple(int(width) for width in data[name]) for name in ("hidden", "ffn", "heads"))
        times = np.asarray(data["milliseconds"], dtype=np.float64)
        if times.shape != tuple(map(len, knots)) or not np.isfinite(times).all():
            raise ValueError(f"{times.shape} numbers for {tuple(map(len, knots))} shapes")
        return cls(knots[0], knots[1], knots[2], times, dict(data["about"]))


@dataclasses.dataclass(frozen=True)
class Costs:
    """Prices shapes.

    Attributes:
        seq_length: tokens of context that FLOPs count attention over.
        latency: measured times, where ``latency`` is asked for.
    """

    seq_length: int = 2048
    latency: LatencyTable | None = None

    def of(self, cost: PruneCost, arch: Architecture) -> float:
        """Parameters, FLOPs per training token, ms per decoded token, or bf16 KV-cache bytes per token of context."""
        if cost == "params":
            return arch.num_parameters()
        if cost == "flops":
            return arch.flops_per_token(self.seq_length)
        if cost == "kv-bytes":
            return arch.kv_bytes_per_token()
        assert self.latency is not None, "measured before the first choice"
        return self.latency.milliseconds_of(arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads)

    def freed(self, cost: PruneCost, before: Architecture, after: Architecture) -> float:
        """What a removal saves, 0 or more.

        A query head that leaves its K/V head to others frees no cache yet; it is credited its share, or the first
        queries of a group would never be worth anything and the last one everything.
        """
        if cost == "kv-bytes":
            gone = before.num_attention_heads - after.num_attention_heads
            return before.kv_bytes_per_token() * gone / before.num_attention_heads
        return max(0.0, self.of(cost, before) - self.of(cost, after))


def knots_between(least: int, most: int, number: int) -> tuple[int, ...]:
    """Widths from ``least`` to ``most``, both included, evenly spread and distinct."""
    return tuple(sorted({round(width) for width in np.linspace(least, most, number)}))


def _between(values: npt.NDArray[np.float64], knots: tuple[int, ...], width: int) -> npt.NDArray[np.float64]:
    """Linear interpolation along the first axis."""
    if len(knots) == 1:
        return np.asarray(values[0])
    cell = min(max(int(np.searchsorted(knots, width, side="right")) - 1, 0), len(knots) - 2)
    share = (width - knots[cell]) / (knots[cell + 1] - knots[cell])
    return np.asarray(values[cell] + share * (values[cell + 1] - values[cell]))
