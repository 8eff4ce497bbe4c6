"""The picture of a family of models: milliseconds a token against the loss on held-out text. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from matplotlib.figure import Figure

from megatron_prune.deployment.latency_table import Timing

DOTS_PER_INCH: Final = 150


def plot_family(timings: Sequence[Timing], losses: Mapping[tuple[str, str], float], output: Path) -> None:
    """Draw a line per precision and number of threads over the models' decoding times.

    Args:
        timings: of the models.
        losses: nats a token by model and precision.
        output: file to write, PNG or whatever its name ends in.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for precision, threads in dict.fromkeys((timing.precision, timing.threads) for timing in timings):
        own = [timing for timing in timings if (timing.precision, timing.threads) == (precision, threads)]
        points = [(statistics.median(timing.decode), losses[timing.name, precision], timing) for timing in own]
        points.sort(key=lambda point: point[0])
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", label=f"{precision}, threads: {threads}")
        for x, y, timing in points:
            axes.annotate(timing.name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("milliseconds a decoded token, batch 1, transformers")
    axes.set_ylabel("loss on held-out text, nats a token")
    axes.set_title("Latency against loss")
    axes.grid(alpha=0.3)
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=DOTS_PER_INCH)
