"""The tables of the page, in Markdown: mean ± sample standard deviation over the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from megatron_prune.study.results import Results, Spread, accuracy, loss

#: Rows of Table 1 by name, as the paper calls them.
SCHEMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "direct-hidden": "direct, hidden only",
        "direct-uniform": "direct, source ratio",
        "direct-searched": "direct, searched shape",
        "sheared-hidden": "ShearedLlama, hidden only",
        "sheared-uniform": "ShearedLlama, source ratio",
        "few-shot": "few-shot pruning, then training",
        "unified": "**unified pruning-aware**",
        "unified-obs": "**unified + second-order update**",
    }
)
METRICS: Final = ("taylor", "taylor-mixed", "diag-hessian", "vectorize", "wanda", "obc", "magnitude", "random")
#: Forced orders by row.
ORDERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "order-stem-attention-ffn": "stem → attention → FFN",
        "order-attention-stem-ffn": "attention → stem → FFN",
        "order-ffn-stem-attention": "FFN → stem → attention",
    }
)
TASKS: Final = ("next_word", "next_name", "line_end")
MISSING: Final = "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def metric_row(metric: str, aware: bool) -> tuple[str, str]:
    """The row that prunes by a metric, all at once or while training, and the stage at which it is measured."""
    return (f"metric-{metric}", "final") if aware else (f"alone-{metric}", "pruned")


def schemes_table(results: Results, source: str) -> str:
    """Table 1: ways of training a small model, at equal tokens."""
    head = ["scheme", "parameters", "hidden / ffn / heads", "tokens", "pruning", "held-out loss", *TASKS, "mean acc"]
    rows = [_scheme(results, source, None, "the source itself")]
    rows += [_scheme(results, source, row, label) for row, label in SCHEMES.items() if results.of(source, row)]
    return table(head, rows)


def _scheme(results: Results, source: str, row: str | None, label: str) -> list[str]:
    records = results.of(source, row)
    tokens, pruning = records[0]["tokens"], [record["pruning_tokens"] for record in records]
    return [
        label,
        _range([record["models"]["final"]["parameters"] for record in records]),
        shapes(results, source, row, "final"),
        f"{tokens:,}",
        _range(pruning) if any(pruning) else MISSING,
        _text(results.spread(source, row, loss("final"))),
        *(_text(results.spread(source, row, accuracy("final", task)), 1) for task in TASKS),
        _text(results.spread(source, row, accuracy("final")), 1),
    ]


def metrics_table(results: Results, source: str) -> str:
    """Table 2: each metric without any training, and pruning while training for the same tokens."""
    head = ["metric", "alone: loss", "mean acc", "pruning-aware: loss", "mean acc", "gain in loss", "pruned after"]
    rows = []
    for metric in METRICS:
        (alone, pruned), (aware, final) = metric_row(metric, aware=False), metric_row(metric, aware=True)
        before, after = results.spread(source, alone, loss(pruned)), results.spread(source, aware, loss(final))
        gain = None
        if before is not None and after is not None:
            gain = Spread(tuple(a - b for a, b in zip(before.values, after.values, strict=True)))
        cells = [_text(before), _text(results.spread(source, alone, accuracy(pruned)), 1)]
        cells += [_text(after), _text(results.spread(source, aware, accuracy(final)), 1), _text(gain)]
        rows.append([metric, *cells, pruning_tokens(results, source, aware)])
    return table(head, rows)


def pruning_tokens(results: Results, source: str, row: str) -> str:
    """Tokens after which the last group went, over the seeds."""
    records = results.of(source, row)
    return _range([record["pruning_tokens"] for record in records]) if records else ""


def orders_table(results: Results, source: str) -> str:
    """Table 6: shrinking all axes together against one after another, to the same shape."""
    head = ["trajectory", "hidden / ffn / heads", "pruning tokens", "loss", *TASKS, "mean acc"]
    rows = []
    for row, label in {"unified": "**unified**", **ORDERS}.items():
        tokens = _range([record["pruning_tokens"] for record in results.of(source, row)])
        scores = [_text(results.spread(source, row, accuracy("pruned", task)), 1) for task in (*TASKS, None)]
        found = [shapes(results, source, row, "pruned"), tokens, _text(results.spread(source, row, loss("pruned")))]
        rows.append([label, *found, *scores])
    return table(head, rows)


def shapes_table(results: Results, source: str) -> str:
    """Table 9: the shapes that metrics and ratios find."""
    head = ["metric", "pruned units : steps", "pruning tokens", "parameters", "hidden / ffn / heads", "loss"]
    base = str(results.facts["pruning"]["prune_ratio"])
    found = [("taylor", ratio_of(results, row), row) for row in ratio_rows(results, source)]
    found += [(metric, base, metric_row(metric, aware=True)[0]) for metric in METRICS if metric != "taylor"]
    rows = []
    for metric, ratio, row in found:
        records = results.of(source, row)
        tokens = _range([record["pruning_tokens"] for record in records])
        parameters = _range([record["models"]["pruned"]["parameters"] for record in records])
        end = [shapes(results, source, row, "pruned"), _text(results.spread(source, row, loss("pruned")))]
        rows.append([metric, ratio, tokens, parameters, *end])
    return table(head, rows)


def has_metrics(results: Results, source: str) -> bool:
    """True if every metric was run, alone and while training."""
    rows = [metric_row(metric, aware)[0] for metric in METRICS for aware in (False, True)]
    return all(results.of(source, row) for row in rows)


def same_as_taylor(results: Results, source: str) -> list[str]:
    """Metrics that led every seed, while training, to the very loss that ``taylor`` led it to."""

    def losses(metric: str) -> list[float]:
        row, stage = metric_row(metric, aware=True)
        return [record["models"][stage]["val_loss"] for record in results.of(source, row)]

    return [metric for metric in METRICS if metric != "taylor" and losses(metric) == losses("taylor")]


def has_orders(results: Results, source: str) -> bool:
    """True if every forced order was run."""
    return all(results.of(source, row) for row in ORDERS)


def has_ratios(results: Results, source: str) -> bool:
    """True if more than one ratio was run, and the metrics."""
    return len(ratio_rows(results, source)) > 1 and has_metrics(results, source)


def ratio_rows(results: Results, source: str) -> list[str]:
    """The taylor rows from the fastest pruning to the slowest."""
    rows = [row for row in results.facts["rows"] if row == "unified" or row.startswith("ratio-")]
    present = [row for row in rows if results.of(source, row)]
    return sorted(present, key=lambda row: results.of(source, row)[0]["pruning_tokens"])


def ratio_of(results: Results, row: str) -> str:
    """Pruned units : optimizer steps of a row."""
    return str(results.facts["rows"][row].get("prune_ratio", results.facts["pruning"]["prune_ratio"]))


def shapes(results: Results, source: str, row: str | None, stage: str) -> str:
    """The shapes of a row's models, each once."""
    names = ("hidden_size", "ffn_hidden_size", "num_attention_heads")
    found = [record["models"][stage]["shape"] for record in results.of(source, row)]
    return ", ".join(dict.fromkeys(" / ".join(str(shape[name]) for name in names) for shape in found))


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _text(spread: Spread | None, digits: int = 3) -> str:
    if spread is None:
        return MISSING
    return spread.text(digits) if len(spread.values) > 1 else f"{spread.mean:.{digits}f}"
