"""The words a run says on the terminal. Pure functions of what is reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_prune.training.speed import format_eta

COUNT_SUFFIXES = (("B", 1e9), ("M", 1e6), ("k", 1e3))


@dataclasses.dataclass(frozen=True)
class Status:
    """What the console shows besides the metrics; everything may be missing.

    Attributes:
        source_parameters: parameters before any pruning.
        target_parameters: parameters pruning goes down to.
        next_type: type of the group that goes next; the one with the least score when not given.
        eta_seconds: time left in the run.
        removed: groups removed since the last line, by type.
    """

    source_parameters: int | None = None
    target_parameters: int | None = None
    next_type: str | None = None
    eta_seconds: float | None = None
    removed: Mapping[str, int] = dataclasses.field(default_factory=dict)


def format_count(count: float) -> str:
    """Three or four digits and a suffix: ``12.3k``, ``457M``, ``457.1M``, ``1.71B``; no trailing zeros."""
    for suffix, size in COUNT_SUFFIXES:
        if count >= size:
            digits = 2 if suffix == "B" else 1
            return f"{count / size:.{digits}f}".rstrip("0").rstrip(".") + suffix
    return f"{count:.0f}"


def format_line(record: Mapping[str, Any], status: Status, total_steps: int | None) -> str:
    """One interval in one line; what is missing is left out.

    Args:
        record: a line of metrics, see :class:`~megatron_prune.training.report.Reporter`.
        status: what the metrics do not hold.
        total_steps: optimizer steps of the run.
    """
    parts = [f"step {record['step']}" + (f"/{total_steps}" if total_steps else "")]
    for key, template in (
        ("loss", "loss {:.3f}"),
        ("val_loss", "val loss {:.3f}"),
        ("grad_norm", "grad {:.2f}"),
        ("lr", "lr {:.1e}"),
    ):
        if record.get(key) is not None:
            parts.append(_short_exponent(template.format(record[key])))
    if record.get("tokens_per_second") is not None:
        parts.append(f"{format_count(record['tokens_per_second'])} tok/s")
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    parts += _shape(record) + _parameters(record, status)
    if status.removed:
        parts.append("removed " + ", ".join(f"{number} {kind}" for kind, number in status.removed.items()))
    parts += _next_candidate(record, status)
    if record.get("skipped"):
        parts.append(f"{record['skipped']} skipped")
    if status.eta_seconds is not None:
        parts.append(f"ETA {format_eta(status.eta_seconds)}")
    return " | ".join(parts)


def format_event(record: Mapping[str, Any], total_steps: int | None) -> str:
    """One event in one line: the step, what happened, and its details as ``name value``."""
    known = {"event", "step", "hidden_size", "ffn_hidden_size", "num_attention_heads", "parameters"}
    parts = [f"step {record['step']}" + (f"/{total_steps}" if total_steps else ""), str(record["event"])]
    parts += _shape(record) + _parameters(record, Status())
    parts += [f"{name} {value}" for name, value in record.items() if name not in known]
    return " | ".join(parts)


def _shape(record: Mapping[str, Any]) -> list[str]:
    names = (("d", "hidden_size"), ("ff", "ffn_hidden_size"), ("h", "num_attention_heads"))
    widths = [f"{short} {record[key]}" for short, key in names if record.get(key) is not None]
    return [" ".join(widths)] if widths else []


def _parameters(record: Mapping[str, Any], status: Status) -> list[str]:
    parameters = record.get("parameters")
    if parameters is None:
        return []
    text = format_count(parameters)
    source, target = status.source_parameters, status.target_parameters
    if target is None:
        return [text]
    if source is None or source <= target:
        return [f"{text} (target {format_count(target)})"]
    done = min(1.0, (source - parameters) / (source - target))
    return [f"{text} (target {format_count(target)}, {done:.0%})"]


def _next_candidate(record: Mapping[str, Any], status: Status) -> list[str]:
    scores = {name: score for name, score in (record.get("scores") or {}).items() if score is not None}
    if not scores:
        return []
    kind = status.next_type or min(scores, key=lambda name: scores[name])
    return [_short_exponent(f"next {kind} {scores[kind]:.1e}")]


def _short_exponent(text: str) -> str:
    """``3.0e-04`` as ``3.0e-4``."""
    return text.replace("e-0", "e-").replace("e+0", "e+")
