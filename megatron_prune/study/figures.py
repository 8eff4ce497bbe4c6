"""The figures of the page. Without matplotlib's state machine, and the same bytes for the same results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from megatron_prune.plotting import DOTS_PER_INCH, RunRecords, plot_run
from megatron_prune.study.results import Results, loss
from megatron_prune.study.tables import METRICS, has_metrics, has_ratios, metric_row, ratio_of, ratio_rows

_PRUNED_COLOUR, _SOURCE_COLOUR = "#0072B2", "#7F7F7F"


def write_figures(results: Results, docs: Path) -> list[Path]:
    """Write the figures there are results for.

    Args:
        results: of the study.
        docs: directory, made if missing.

    Returns:
        The files: ``study_tokens.png`` (the paper's Figure 3), ``study_saliency.png`` and ``study_shape.png`` (its
        Figure 5), ``study_metrics.png``.
    """
    docs.mkdir(parents=True, exist_ok=True)
    source = results.sources()[0]
    drawings: dict[str, Callable[[Results, str], Figure]] = {}
    if has_ratios(results, source):
        drawings["study_tokens.png"] = _tokens_figure
    if has_metrics(results, source):
        drawings["study_metrics.png"] = _metrics_figure
    paths = []
    for name, draw in drawings.items():
        paths.append(docs / name)
        # Without the version of matplotlib in it, files differ only where pictures do.
        draw(results, source).savefig(paths[-1], dpi=DOTS_PER_INCH, metadata={"Software": None})
    return paths + _traces(results, source, docs)


def _tokens_figure(results: Results, source: str) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    alone = results.spread(source, "alone-taylor", loss("pruned"))
    points = [] if alone is None else [(0.0, alone, "no training")]
    for row in ratio_rows(results, source):
        records, spread = results.of(source, row), results.spread(source, row, loss("pruned"))
        assert spread is not None, row
        tokens = sum(record["pruning_tokens"] for record in records) / len(records)
        points.append((tokens / 1000, spread, f"{ratio_of(results, row)}"))
    tokens_k = [tokens for tokens, _, _ in points]
    means, deviations = [s.mean for _, s, _ in points], [s.deviation for _, s, _ in points]
    label = "pruned, no further training"
    axes.errorbar(tokens_k, means, yerr=deviations, fmt="o-", color=_PRUNED_COLOUR, capsize=3, label=label)
    for tokens, spread, label in points:
        axes.annotate(label, (tokens, spread.mean), xytext=(6, 6), textcoords="offset points", fontsize=8)
    full = results.spread(source, None, loss("final"))
    assert full is not None, "every study has its source"
    axes.axhline(full.mean, color=_SOURCE_COLOUR, linestyle="--", label="source")
    axes.set_xlabel("thousand tokens of the pruning stage (pruned units : steps beside the points)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title(f"Loss of the pruned model over the tokens of pruning ({source})")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _metrics_figure(results: Results, source: str) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = ((-0.12, "alone", "#D55E00", "s"), (0.12, "pruning-aware", _PRUNED_COLOUR, "o"))
    for offset, name, colour, marker in styles:
        places, means, deviations = [], [], []
        for place, metric in enumerate(METRICS):
            row, stage = metric_row(metric, aware=name != "alone")
            spread = results.spread(source, row, loss(stage))
            if spread is not None:
                places.append(place + offset)
                means.append(spread.mean)
                deviations.append(spread.deviation)
        axes.errorbar(places, means, yerr=deviations, fmt=marker, color=colour, capsize=3, label=name)
    axes.set_xticks(range(len(METRICS)), METRICS, rotation=30, ha="right")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title(f"Each metric, without and with training while pruning ({source})")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _traces(results: Results, source: str, docs: Path) -> list[Path]:
    """Saliency and shape over training of the first seed, drawn as those of any run."""
    records = [record for record in results.of(source, "unified") if record.get("events")]
    if not records:
        return []
    record = records[0]
    start = results.of(source, None)[0]["models"]["final"]
    training = [
        {"tokens": tokens, "step": 1, "loss": None, "parameters": start["parameters"], **start["shape"]}
        for tokens in (0, record["tokens"])
    ]
    drawn = RunRecords(tuple(training), (), tuple(record["events"]))
    scratch = docs / ".study_plots"
    kept = []
    for path in plot_run(drawn, scratch):
        if path.stem in ("saliency", "shape"):
            kept.append(path.replace(docs / f"study_{path.name}"))
        else:
            path.unlink()
    scratch.rmdir()
    return kept
