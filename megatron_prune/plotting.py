"""Pictures of a run, from its metrics.jsonl and ledger.jsonl. The only module that needs matplotlib."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_prune.errors import UserError
from megatron_prune.training.console import COUNT_SUFFIXES, format_count
from megatron_prune.training.report import METRICS_FILE, read_jsonl

LEDGER_FILE = "ledger.jsonl"
DOTS_PER_INCH = 150
#: Points of the running mean that is drawn over the training loss, as a share of the run.
SMOOTHING_SHARE = 0.02
#: Top of an axis that starts at zero, relative to the largest value, so that a line at the top shows.
HEADROOM = 1.05


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How one mini-group type is drawn. Colours are Okabe and Ito's, told apart by colour-blind readers too."""

    label: str
    width: str
    colour: str
    dash: str


_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "attention": _Kind("attention heads", "num_attention_heads", "#0072B2", "-"),
        "ffn": _Kind("FFN channels", "ffn_hidden_size", "#D55E00", "--"),
        "stem": _Kind("stem channels", "hidden_size", "#009E73", "-."),
    }
)
_TRAIN_COLOUR, _VALIDATION_COLOUR, _MARK_COLOUR = "#56B4E9", "#000000", "#7F7F7F"


@dataclasses.dataclass(frozen=True)
class RunRecords:
    """What a run directory tells.

    Attributes:
        training: metrics lines of training intervals.
        validation: metrics lines that have ``val_loss``, with ``tokens`` filled in.
        events: ledger lines; empty when nothing was pruned.
    """

    training: tuple[Mapping[str, Any], ...]
    validation: tuple[Mapping[str, Any], ...]
    events: tuple[Mapping[str, Any], ...]


def read_run(run_dir: Path) -> RunRecords:
    """Read a run directory, of a finished run or of one in progress (a torn last line is left out).

    Raises:
        UserError: there is no metrics.jsonl, nothing in it, or a file is damaged.
    """
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{run_dir} has no {METRICS_FILE}; give the --save directory of a run that has logged a step")
    metrics = read_jsonl(path)
    ledger = run_dir / LEDGER_FILE
    events = read_jsonl(ledger) if ledger.is_file() else []
    training = tuple(record for record in metrics if "loss" in record)
    if not training:
        raise UserError(f"{path} has no whole training line yet; try again after the first --log-interval")
    per_step = training[-1]["tokens"] / training[-1]["step"]
    validation = tuple({"tokens": record["step"] * per_step, **record} for record in metrics if "val_loss" in record)
    return RunRecords(training, validation, tuple(events))


def plot_run(records: RunRecords, output: Path) -> list[Path]:
    """Write the pictures there is data for.

    Args:
        records: from :func:`read_run`.
        output: directory, made if missing.

    Returns:
        Paths of the PNG files: ``saliency.png`` (the paper's Figure 5) and ``shape.png`` when groups were removed,
        ``loss.png`` and ``throughput.png`` always.
    """
    drawings: dict[str, Callable[[RunRecords], Figure]] = {}
    if records.events:
        drawings |= {"saliency.png": _saliency_figure, "shape.png": _shape_figure}
    drawings |= {"loss.png": _loss_figure, "throughput.png": _throughput_figure}
    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in drawings.items():
        paths.append(output / name)
        draw(records).savefig(paths[-1], dpi=DOTS_PER_INCH)
    return paths


def source_widths(records: RunRecords) -> dict[str, int]:
    """Widths before the first removal, by type: the largest seen, the first removed group added back."""
    first = records.events[0]
    widths = {}
    for kind, style in _KINDS.items():
        seen = [record[style.width] for record in records.training if record.get(style.width) is not None]
        widths[kind] = max([*seen, first["shape"][style.width] + (first["type"] == kind)])
    return widths


def _saliency_figure(records: RunRecords) -> Figure:
    figure = Figure(figsize=(8, 7), layout="constrained")
    scores, shares = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    tokens = [event["tokens"] for event in records.events]
    source = source_widths(records)
    for kind, style in _KINDS.items():
        values = [_positive(event["scores"].get(kind)) for event in records.events]
        scores.plot(tokens, values, style.dash, color=style.colour, label=style.label, linewidth=1.2)
        remaining = [event["shape"][style.width] / source[kind] for event in records.events]
        shares.step([0, *tokens], [1.0, *remaining], style.dash, where="post", color=style.colour, label=style.label)
    scores.set_yscale("log")
    scores.set_ylabel("saliency of the next group")
    scores.set_title("Saliency of the three candidates, and what remains")
    scores.legend(title="candidate")
    shares.set_ylabel("remaining / source")
    shares.set_ylim(0, HEADROOM)
    shares.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    shares.legend(loc="lower left")
    _over_tokens(shares)
    scores.grid(alpha=0.3)
    return figure


def _shape_figure(records: RunRecords) -> Figure:
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flat
    tokens = [event["tokens"] for event in records.events]
    source = source_widths(records)
    end = max(tokens[-1], records.training[-1]["tokens"])
    for axes, (kind, style) in zip(panels, _KINDS.items(), strict=False):
        widths = [source[kind], *(event["shape"][style.width] for event in records.events)]
        axes.step([0, *tokens, end], [*widths, widths[-1]], where="post", color=style.colour)
        axes.set_ylabel(style.label)
        axes.set_title(f"{style.label}: {widths[0]} → {widths[-1]}")
    parameters = panels[-1]
    counts = [event["parameters"] for event in records.events]
    # Only a metrics line written before the first removal tells the source's count; without one the curve starts low.
    before = max([counts[0], *(record["parameters"] for record in records.training if "parameters" in record)])
    parameters.step([0, *tokens, end], [before, *counts, counts[-1]], where="post", color=_VALIDATION_COLOUR)
    parameters.set_ylabel("parameters")
    parameters.yaxis.set_major_formatter(_tick)
    parameters.set_title(f"parameters: {format_count(before)} → {format_count(counts[-1])}")
    for axes in panels:
        axes.set_ylim(0, axes.get_ylim()[1] * HEADROOM)
        axes.grid(alpha=0.3)
    for axes in (panels[2], panels[3]):
        _over_tokens(axes)
    return figure


def _loss_figure(records: RunRecords) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    tokens = [record["tokens"] for record in records.training]
    loss = [_number(record.get("loss")) for record in records.training]
    axes.plot(tokens, loss, color=_TRAIN_COLOUR, linewidth=0.8, alpha=0.6, label="training, every logged step")
    window = max(1, round(len(loss) * SMOOTHING_SHARE))
    if window > 1:
        axes.plot(tokens, _running_mean(loss, window), color="#0072B2", label=f"training, mean of {window}")
    if records.validation:
        points = [(record["tokens"], _number(record["val_loss"])) for record in records.validation]
        axes.plot(*zip(*points, strict=True), "o-", color=_VALIDATION_COLOUR, markersize=4, label="validation")
    _mark_end_of_pruning(axes, records)
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Loss")
    axes.legend()
    _over_tokens(axes)
    return figure


def _throughput_figure(records: RunRecords) -> Figure:
    with_mfu = any(record.get("mfu") is not None for record in records.training)
    figure = Figure(figsize=(8, 6 if with_mfu else 4.5), layout="constrained")
    panels = figure.subplots(2 if with_mfu else 1, 1, sharex=True, squeeze=False)[:, 0]
    tokens = [record["tokens"] for record in records.training]
    speed = [_number(record.get("tokens_per_second")) for record in records.training]
    panels[0].plot(tokens, speed, color="#0072B2", linewidth=1.0, label="measured")
    panels[0].set_ylabel("tokens per second")
    panels[0].yaxis.set_major_formatter(_tick)
    panels[0].set_title("Throughput")
    if with_mfu:
        mfu = [_number(record.get("mfu")) for record in records.training]
        panels[1].plot(tokens, mfu, color="#D55E00", linewidth=1.0, label="MFU")
        panels[1].set_ylabel("MFU (of the dense bf16 peak)")
        panels[1].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for axes in panels:
        _mark_end_of_pruning(axes, records)
        axes.set_ylim(0, axes.get_ylim()[1] * HEADROOM)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    _over_tokens(panels[-1])
    return figure


def _mark_end_of_pruning(axes: Axes, records: RunRecords) -> None:
    if records.events:
        last = records.events[-1]["tokens"]
        axes.axvline(last, color=_MARK_COLOUR, linestyle=":", label="last group removed")


def _over_tokens(axes: Axes) -> None:
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(_tick)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)


def _tick(value: float, _: object) -> str:
    """Label of an axis: never rounded as a count in running text is, or neighbouring ticks would look uneven."""
    suffix, size = next((pair for pair in COUNT_SUFFIXES if value >= pair[1]), ("", 1))
    return f"{value / size:g}{suffix}"


def _number(value: float | None) -> float:
    """A gap in the curve (NaN) where the file says null."""
    return math.nan if value is None else value


def _positive(value: float | None) -> float:
    """As :func:`_number`, and a gap where a logarithm has no place for the value."""
    return value if value is not None and value > 0 else math.nan


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last ``window`` values, gaps left out."""
    return [_mean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return sum(finite) / len(finite) if finite else math.nan
