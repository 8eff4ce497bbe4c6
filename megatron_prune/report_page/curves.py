"""What the page draws over tokens: curves of bounded length, as the page's script reads them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from megatron_prune.report_page.records import WIDTH_NAMES, Run, number

#: Points of a curve; a longer one keeps the extremes of equal stretches.
MAX_POINTS: Final = 1000
GIB: Final = 1 << 30

Style = Literal["line", "dashed", "dotted", "faint", "step", "points", "level"]
#: How numbers of an axis are written: ``count`` with k, M, B; ``fixed`` to three digits; ``share`` in per cent.
Format = Literal["count", "fixed", "share", "power"]


@dataclasses.dataclass(frozen=True)
class Curve:
    """One curve.

    Attributes:
        name: for the legend and the hover.
        colour: number of a colour of the page, or 0 for that of the text.
        style: ``line``, ``dashed`` or ``dotted``; ``faint`` lies behind another; ``step`` holds its value until the
            next; ``points`` has dots; ``level`` is a dashed line for a limit.
        x: tokens.
        y: values, None where there is none.
    """

    name: str
    colour: int
    style: Style
    x: Sequence[float]
    y: Sequence[float | None]


@dataclasses.dataclass(frozen=True)
class Chart:
    """One chart over tokens.

    Attributes:
        id: of its element in the page.
        title: what it shows.
        unit: of the vertical axis.
        format: of its numbers.
        curves: at least one with a point, or the chart is empty.
        empty: what to say where there is no point.
        logarithmic: scale of the vertical axis.
        from_zero: whether that axis begins at zero.
        wide: takes the whole width of the page.
    """

    id: str
    title: str
    unit: str
    format: Format
    curves: Sequence[Curve]
    empty: str
    logarithmic: bool = False
    from_zero: bool = False
    wide: bool = False

    @property
    def drawn(self) -> bool:
        """Whether there is something to draw: a level alone says nothing."""
        return any(value is not None for curve in self.curves if curve.style != "level" for value in curve.y)

    def data(self, mark: float | None, end: float) -> dict[str, Any]:
        """JSON for the script.

        Args:
            mark: tokens at which pruning ended, or None.
            end: of the horizontal axis.
        """
        return {
            "id": self.id,
            "title": self.title,
            "unit": self.unit,
            "format": self.format,
            "log": self.logarithmic,
            "zero": self.from_zero,
            "mark": mark,
            "end": end,
            "curves": [_short_curve(curve) for curve in self.curves],
        }


def charts(run: Run) -> list[Chart]:
    """Every chart of the page, in its order."""
    return [*_shape(run), _saliency(run), _loss(run), _throughput(run), _memory(run), _rate(run), _norm(run)]


def thinned(
    x: Sequence[float], y: Sequence[float | None], most: int = MAX_POINTS
) -> tuple[list[float], list[float | None]]:
    """At most ``most`` points of a curve: of equal stretches the least and the largest value, and both ends.

    Args:
        x: ascending.
        y: as many values.
        most: 4 or more.
    """
    if len(x) <= most:
        return list(x), list(y)
    stretches = (most - 2) // 2
    kept = {0, len(x) - 1}
    for stretch in range(stretches):
        places = range(stretch * len(x) // stretches, (stretch + 1) * len(x) // stretches)
        valued = [(value, place) for place in places if (value := y[place]) is not None]
        kept |= {min(valued)[1], max(valued)[1]} if valued else {places[0]}
    order = sorted(kept)
    return [x[place] for place in order], [y[place] for place in order]


def end_of_pruning(run: Run) -> int | None:
    """Tokens at the last removal, if the run is past its pruning."""
    if not run.events or run.target_parameters is None or run.events[-1].parameters > run.target_parameters:
        return None
    return run.events[-1].tokens


def _short_curve(curve: Curve) -> dict[str, Any]:
    x, y = thinned(curve.x, curve.y)
    digits = [None if value is None else float(f"{value:.6g}") for value in y]
    return {"name": curve.name, "colour": curve.colour, "style": curve.style, "x": x, "y": digits}


def _shape(run: Run) -> list[Chart]:
    nothing = "Not known yet: the first line of metrics comes after --log-interval steps."
    titles = {
        "attention": ("Attention heads", "per layer"),
        "ffn": ("FFN channels", "per layer"),
        "stem": ("Stem channels", "hidden size"),
    }
    found = []
    for colour, (kind, (title, unit)) in enumerate(titles.items(), 1):
        curve = _steps(run, title, colour, run.source_width(kind), WIDTH_NAMES[kind])
        found.append(Chart(f"shape-{kind}", title, unit, "count", [curve], nothing, from_zero=True))
    curves = [_steps(run, "Parameters", 4, run.source_parameters, "parameters")]
    if run.target_parameters is not None:
        ends = [0.0, float(run.last_tokens)]
        curves.append(Curve("target", 0, "level", ends, [float(run.target_parameters)] * 2))
    parameters = Chart("parameters", "Parameters", "with embeddings", "count", curves, nothing, from_zero=True)
    return [*found, parameters]


def _steps(run: Run, name: str, colour: int, before: int | None, key: str) -> Curve:
    """A width or the parameters: what the source has, the value after every removal, and until the last line."""
    x: list[float] = [] if before is None else [0]
    y: list[float | None] = [] if before is None else [before]
    for event in run.events:
        x.append(event.tokens)
        y.append(event.parameters if key == "parameters" else event.shape.get(key))
    if x:
        x.append(run.last_tokens)
        y.append(y[-1])
    return Curve(name, colour, "step", x, y)


def _saliency(run: Run) -> Chart:
    labels: dict[str, tuple[str, Style]] = {
        "attention": ("attention head", "line"),
        "ffn": ("FFN channel", "dashed"),
        "stem": ("stem channel", "dotted"),
    }
    x = [event.tokens for event in run.events]
    curves = []
    for colour, (kind, (label, style)) in enumerate(labels.items(), 1):
        scores = [number(event.scores.get(kind)) for event in run.events]
        curves.append(Curve(label, colour, style, x, [one if one is not None and one > 0 else None for one in scores]))
    return Chart(
        "saliency",
        "Saliency of the three candidates",
        "score of the next to go",
        "power",
        curves,
        "No removal is on record, so there are no scores." if not run.events else "No score is above zero.",
        logarithmic=True,
        wide=True,
    )


def _loss(run: Run) -> Chart:
    x, y = _column(run.training, "loss")
    window = max(1, round(len(y) / 50))
    curves = [Curve("training, each line", 1, "faint" if window > 1 else "line", x, y)]
    if window > 1:
        curves.append(Curve(f"training, mean of {window} lines", 1, "line", x, _running_mean(y, window)))
    if run.validation:
        curves.append(Curve("validation", 2, "points", *_column(run.validation, "val_loss")))
    empty = "No loss is logged yet; the first line comes after --log-interval steps."
    return Chart("loss", "Loss", "nats per token", "fixed", curves, empty, wide=True)


def _throughput(run: Run) -> Chart:
    x, y = _column(run.training, "tokens_per_second")
    curves = [Curve("tokens per second", 3, "line", x, y)]
    return Chart("throughput", "Throughput", "tokens/s", "count", curves, "Not recorded.", from_zero=True)


def _memory(run: Run) -> Chart:
    x, y = _column(run.training, "memory_bytes")
    curves = [Curve("peak", 4, "line", x, [None if value is None else value / GIB for value in y])]
    empty = "Not recorded: runs on CUDA devices log the peak of the main process's GPU, others do not."
    return Chart("memory", "GPU memory", "GiB, main process", "fixed", curves, empty, from_zero=True)


def _rate(run: Run) -> Chart:
    curves = [Curve("learning rate", 1, "line", *_column(run.training, "lr"))]
    return Chart("learning-rate", "Learning rate", "per step", "power", curves, "Not recorded.", from_zero=True)


def _norm(run: Run) -> Chart:
    curves = [Curve("gradient norm", 2, "line", *_column(run.training, "grad_norm"))]
    return Chart("gradient", "Gradient norm", "before clipping", "fixed", curves, "Not recorded.", from_zero=True)


def _column(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float | None]]:
    return [line["tokens"] for line in lines], [number(line.get(key)) for line in lines]


def _running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """Mean of the last ``window`` values, gaps left out, in one pass."""
    sums = list(itertools.accumulate((value or 0.0 for value in values), initial=0.0))
    counts = list(itertools.accumulate((value is not None for value in values), initial=0))
    means: list[float | None] = []
    for end in range(1, len(values) + 1):
        first = max(0, end - window)
        there = counts[end] - counts[first]
        means.append((sums[end] - sums[first]) / there if there else None)
    return means
