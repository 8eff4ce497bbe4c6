"""Tokens per second, MFU of the current shape, and the time that is left."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections import deque
from collections.abc import Callable, Iterator

from megatron_prune.architecture import Architecture

#: Dense bf16 tensor-core peaks in FLOP/s with fp32 accumulation. Sources: NVIDIA's product data sheets and the
#: architecture white papers (Ampere, Ada, Hopper, Blackwell), AMD's for MI300X. Where a data sheet only prints the
#: figure "with sparsity", this is half of it. A device matches when its name has every word.
PEAK_BF16_FLOPS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("B200",), 2250e12),
    (("GB200",), 2500e12),
    (("H200", "NVL"), 835.5e12),
    (("H200",), 989e12),
    (("GH200",), 989e12),
    (("H100", "PCIE"), 756e12),
    (("H100", "NVL"), 835.5e12),
    (("H100",), 989e12),
    (("A100",), 312e12),
    (("A800",), 312e12),
    (("A40",), 149.7e12),
    (("A30",), 165e12),
    (("A10",), 125e12),
    (("L40S",), 362e12),
    (("L40",), 181e12),
    (("L4",), 121e12),
    (("A6000",), 154.8e12),
    (("5090",), 209.5e12),
    (("4090",), 165.2e12),
    (("3090",), 71e12),
    (("MI300X",), 1307.4e12),
)

#: Updates over which :class:`Eta` measures the time of a step: pruning makes steps faster, old ones mislead.
ETA_WINDOW = 50

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device, e.g. of ``torch.cuda.get_device_name()``; None when not known (any CPU)."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    for needed, flops in PEAK_BF16_FLOPS:
        if words.issuperset(needed):
            return flops
    return None


@dataclasses.dataclass(frozen=True)
class Speed:
    """What :meth:`Throughput.read` measured.

    Attributes:
        tokens_per_second: of the whole job.
        mfu: share of the devices' dense bf16 peak in [0, 1], or None when the peak is not known.
    """

    tokens_per_second: float
    mfu: float | None


class Throughput:
    """Meter of tokens per second and MFU between two reads.

    FLOPs are summed step by step with the shape of that step, so an interval in which the model shrank is counted
    right.

    Args:
        seq_length: tokens per sequence; attention's share of the FLOPs grows with it.
        num_devices: accelerators that share the work.
        peak: FLOP/s of one of them, see :func:`peak_flops`, or None.
        clock: seconds, monotonic.
    """

    def __init__(
        self, seq_length: int, num_devices: int, peak: float | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._seq_length = seq_length
        self._peak = None if peak is None else peak * num_devices
        self._clock = clock
        self._tokens = 0
        self._flops = 0.0
        self._since = clock()

    def add(self, tokens: int, arch: Architecture) -> None:
        """Count a step: tokens of the global batch, and the shape they were trained with."""
        self._tokens += tokens
        self._flops += tokens * arch.flops_per_token(self._seq_length)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out: validation, checkpoints, exports."""
        began = self._clock()
        try:
            yield
        finally:
            self._since += self._clock() - began

    def read(self) -> Speed:
        """The speed since the last read (or the start), and begin a new interval."""
        now = self._clock()
        # A clock too coarse to see the interval must not divide by zero.
        seconds = max(now - self._since, time.get_clock_info("perf_counter").resolution)
        speed = Speed(self._tokens / seconds, None if self._peak is None else self._flops / seconds / self._peak)
        self._tokens, self._flops, self._since = 0, 0.0, now
        return speed


class Eta:
    """Time left in a run, at the pace of the last :data:`ETA_WINDOW` steps.

    Both stages count: ``--train-iters`` is their sum, and a model that has shrunk is faster than the mean so far.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._steps: deque[tuple[float, int]] = deque(maxlen=ETA_WINDOW)

    def update(self, step: int) -> None:
        """Tell how many optimizer steps are done by now; fewer than before if the run has gone back."""
        if self._steps and step <= self._steps[-1][1]:
            self._steps.clear()
        self._steps.append((self._clock(), step))

    def seconds(self, steps_left: int) -> float | None:
        """Seconds for the steps that are left, or None while there is nothing to measure a pace by."""
        if len(self._steps) < 2:
            return None
        (began, first), (now, last) = self._steps[0], self._steps[-1]
        return steps_left * (now - began) / (last - first)


def format_eta(seconds: float) -> str:
    """Two leading units: ``45s``, ``12m05s``, ``3h12m``, ``2d03h``."""
    whole = max(0, round(seconds))
    if whole < _MINUTE:
        return f"{whole}s"
    if whole < _HOUR:
        return f"{whole // _MINUTE}m{whole % _MINUTE:02d}s"
    if whole < _DAY:
        return f"{whole // _HOUR}h{whole % _HOUR // _MINUTE:02d}m"
    return f"{whole // _DAY}d{whole % _DAY // _HOUR:02d}h"
