"""The head of the page: name, state, how far, how long, and the numbers of the last line."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence

from megatron_prune.report_page.records import Run, number
from megatron_prune.training.console import format_count
from megatron_prune.training.speed import format_eta

#: Lines whose speed the time that is left is reckoned by.
SPEED_LINES = 5


def summary(run: Run, name: str) -> str:
    """Markup of the head.

    Args:
        run: what was read.
        name: of the run, escaped.
    """
    state = run.state
    return (
        f'<header>\n<div class="title"><h1>{name}</h1><span class="state {state.name}">{state.name}</span></div>\n'
        f'<p class="why">{html.escape(state.why)}</p>\n'
        f'<div class="bars">{_steps_bar(run)}{_target_bar(run)}</div>\n<dl class="numbers">{_numbers(run)}</dl>\n'
        "</header>\n"
    )


def seconds_left(run: Run) -> float | None:
    """Time for the steps that are left at the median speed of the last lines; validations and checkpoints come on top.

    None where the run is not going on, or its length or speed are not known.
    """
    if run.state.name != "running" or run.config is None:
        return None
    speeds = [speed for line in run.training[-SPEED_LINES:] if (speed := number(line.get("tokens_per_second")))]
    steps = run.config.train.train_iters - run.last_step
    return steps * run.config.batch_tokens / statistics.median(speeds) if speeds and steps > 0 else None


def target_share(run: Run) -> float | None:
    """Part of the way from the source's parameters to the target's, 0 to 1; None without such a target."""
    first, last, now = run.source_parameters, run.target_parameters, run.parameters
    if first is None or last is None or now is None:
        return None
    return max(0.0, min(1.0, (first - now) / (first - last))) if first > last else 1.0


def _steps_bar(run: Run) -> str:
    total = 0 if run.config is None else run.config.train.train_iters
    if not total:
        return _bar("Steps", f"{run.last_step:,}, of a number that is not known", None)
    share = min(1.0, run.last_step / total)
    left = seconds_left(run)
    eta = "" if left is None else f", about {format_eta(left)} left"
    return _bar("Steps", f"{run.last_step:,} of {total:,}{eta}", share)


def _target_bar(run: Run) -> str:
    share, target, now = target_share(run), run.target_parameters, run.parameters
    if share is not None and target is not None and now is not None:
        met = "met" if now <= target else f"{format_count(now)} now"
        return _bar("Target", f"{format_count(target)} parameters, {met}", share)
    if run.config is not None and run.config.prune.active:
        ends = [f"{flag} {value}" for flag, value in run.config.prune.targets.items()] or ["the replayed ledger"]
        return _bar("Target", f"{' '.join(ends)}: how far is not known from parameters", None)
    return _bar("Target", "none: this run does not prune", None)


def _bar(label: str, text: str, share: float | None) -> str:
    inside = "" if share is None else f'<i style="width:{share:.1%}"></i>'
    percent = "" if share is None else f"<b>{share:.0%}</b>"
    return (
        f'<div class="progress"><p><span>{label}</span> {html.escape(text)} {percent}</p>'
        f'<div class="bar">{inside}</div></div>'
    )


def _numbers(run: Run) -> str:
    last = run.training[-1] if run.training else {}
    shape = [last.get(key) for key in ("hidden_size", "ffn_hidden_size", "num_attention_heads")]
    if run.events and run.events[-1].tokens >= last.get("tokens", 0):
        shape = [run.events[-1].shape.get(key) for key in ("hidden_size", "ffn_hidden_size", "num_attention_heads")]
    validation = run.validation[-1] if run.validation else None
    before, now = run.source_parameters, run.parameters
    rows: Sequence[tuple[str, str | None, str]] = (
        ("parameters", None if now is None else f"{now:,}", f"of {before:,}" if before else ""),
        ("hidden / FFN / heads", None if None in shape else " / ".join(map(str, shape)), ""),
        ("tokens", format_count(run.last_tokens), ""),
        ("training loss", _fixed(last.get("loss")), f"at step {last['step']:,}" if last else ""),
        (
            "validation loss",
            None if validation is None else _fixed(validation["val_loss"]),
            "" if validation is None else f"at step {validation['step']:,}",
        ),
        ("tokens/s", _count(last.get("tokens_per_second")), _mfu(last.get("mfu"))),
        ("removals", f"{len(run.events):,}", ""),
        ("newest checkpoint", run.checkpoints[-1] if run.checkpoints else None, ""),
    )
    return "".join(
        f"<div><dt>{label}</dt><dd>{html.escape(value or 'none yet')}<small>{html.escape(more)}</small></dd></div>"
        for label, value, more in rows
    )


def _fixed(value: object) -> str | None:
    found = number(value)
    return None if found is None else f"{found:.3f}"


def _count(value: object) -> str | None:
    found = number(value)
    return None if found is None else format_count(found)


def _mfu(value: object) -> str:
    found = number(value)
    return "" if found is None else f"MFU {found:.1%}"
