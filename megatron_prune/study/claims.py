"""What the results say, in sentences: whatever comes out, also where it speaks against pruning while training."""

from __future__ import annotations

from typing import Final

from megatron_prune.study.results import Results, Spread, loss
from megatron_prune.study.tables import METRICS, SCHEMES, metric_row

#: The metrics that are there to be beaten.
WEAK: Final = ("random", "magnitude")
OURS: Final = "unified"


def first_paragraph(results: Results) -> str:
    """Whether random and magnitude are worse than taylor, and which baselines beat pruning while training."""
    source = results.sources()[0]
    sentences = [_weak(results, source, aware) for aware in (False, True)]
    sentences += [_beaten(results, name) for name in results.sources()]
    return " ".join(sentence for sentence in sentences if sentence)


def second_paragraph(results: Results) -> str:
    """By how much pruning while training is better or worse than each other scheme, all at equal tokens."""
    return "\n\n".join(filter(None, (_margins(results, source) for source in results.sources())))


def _weak(results: Results, source: str, aware: bool) -> str:
    """One sentence on the weak metrics against taylor; empty if they were not run."""

    def spread(metric: str) -> Spread | None:
        row, stage = metric_row(metric, aware)
        return results.spread(source, row, loss(stage))

    taylor = spread("taylor")
    said = [_verdict(metric, found, taylor) for metric in WEAK if (found := spread(metric)) and taylor]
    if not said or taylor is None:
        return ""
    way = "Pruned all at once without training"
    if aware:
        way = f"Pruned while training for {results.of(source, metric_row('taylor', aware)[0])[0]['tokens']:,} tokens"
    sentence = f"{way}, {' and '.join(said)} than `taylor` ({taylor.text()} held-out loss)"
    others = [metric for metric in METRICS if metric not in (*WEAK, "taylor")]
    lower = [(metric, found) for metric in others if (found := spread(metric)) and found.mean < taylor.mean]
    if not lower:
        return f"{sentence}, and no metric has a lower loss than it."
    return f"{sentence}, and lower than it {'is' if len(lower) == 1 else 'are'} " + (
        ", ".join(f"`{metric}` ({found.text()}, {_how(found, taylor)})" for metric, found in lower) + "."
    )


def _verdict(metric: str, found: Spread, taylor: Spread) -> str:
    """``random`` is clearly worse (4.1 ± 0.1): every seed of one beats every seed of the other, or it is not clear."""
    clearly = "clearly" if found.apart(taylor) else "not clearly"
    return f"`{metric}` is {clearly} {'worse' if found.mean > taylor.mean else 'better'} ({found.text()})"


def _how(one: Spread, other: Spread) -> str:
    return "clearly" if one.apart(other) else "within the spread of the seeds"


def _beaten(results: Results, source: str) -> str:
    """Which schemes have a lower mean loss than ours."""
    ours = results.spread(source, OURS, loss("final"))
    if ours is None:
        return ""
    better = []
    for row, label in SCHEMES.items():
        other = results.spread(source, row, loss("final"))
        if row.startswith(OURS) or other is None or other.mean >= ours.mean:
            continue
        better.append(f"{label} ({other.text()}, {_how(other, ours)})")
    head = f"Source `{source}`, at equal tokens:"
    if better:
        return f"{head} unified pruning-aware pretraining ({ours.text()}) is beaten by {', '.join(better)}."
    return f"{head} no baseline has a lower loss than unified pruning-aware pretraining ({ours.text()})."


def _margins(results: Results, source: str) -> str:
    """A list of differences in loss, seed by seed."""
    ours = results.spread(source, OURS, loss("final"))
    if ours is None:
        return ""
    lines = [f"Loss of each other scheme minus that of unified pruning, source `{source}`, by the same seeds:", ""]
    for row, label in SCHEMES.items():
        other = results.spread(source, row, loss("final"))
        if row == OURS or other is None:
            continue
        paired = Spread(tuple(b - a for a, b in zip(ours.values, other.values, strict=True)))
        lines.append(f"- {label.strip('*')}: {paired.mean:+.3f} ± {paired.deviation:.3f}")
    return "\n".join(lines)
