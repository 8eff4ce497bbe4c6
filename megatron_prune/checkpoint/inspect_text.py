"""A checkpoint's description as a person reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from megatron_prune.checkpoint.inspect import Description
from megatron_prune.pruning.ledger import Event

_KINDS = {"stem": "hidden channels", "ffn": "FFN channels", "attention": "heads"}


def format_description(found: Description, num_events: int) -> str:
    """Some twenty lines.

    Args:
        found: what to show.
        num_events: last removals to list.
    """
    return "\n".join((f"{found.path}", *_facts(found), *_shape_table(found), *_ledger_tail(found.events, num_events)))


def _facts(found: Description) -> Iterator[str]:
    progress = found.manifest.progress
    skipped = f" ({progress.skipped} skipped)" if progress.skipped else ""
    consumed = f"{progress.consumed_samples:,} samples, {found.tokens:,} tokens"
    yield f"  progress    step {progress.step:,}{skipped}, {consumed}"
    share = found.pruned_share
    yield f"  stage       {found.stage}" + ("" if share is None else f", {share:.1%} of the way to the target")
    counts = Counter(event.type for event in found.events)
    removed = ", ".join(f"{counts[kind]:,} {words}" for kind, words in _KINDS.items() if counts[kind])
    yield f"  removed     {removed or 'nothing yet'}"
    if progress.exported:
        yield f"  exported    {', '.join(progress.exported)}"
    yield f"  layout      {found.layout}, {len(found.shards)} shards"
    sizes = sorted(found.shards.values())
    yield (
        f"  size        {found.total_bytes:,} bytes, {found.bytes_per_parameter:.2f} per live parameter; "
        f"shards of {sizes[0]:,} to {sizes[-1]:,}"
    )


def _shape_table(found: Description) -> Iterator[str]:
    now, source, target = found.now, found.source, found.target
    goal = (None, None, None) if target is None or target.shape is None else target.shape
    rows: list[tuple[str, int | str, int | str, int | None]] = [
        ("parameters", now.num_parameters(), source.num_parameters(), None if target is None else target.parameters),
        ("hidden", now.hidden_size, source.hidden_size, goal[0]),
        ("ffn", now.ffn_hidden_size, source.ffn_hidden_size, goal[1]),
        ("heads", now.num_attention_heads, source.num_attention_heads, goal[2]),
        ("kv heads", _kv_heads(now.kv_groups), _kv_heads(source.kv_groups), None),
        ("layers", now.num_layers, source.num_layers, None),
    ]
    yield f"  {'':12}{'now':>16}{'source':>16}{'target':>16}"
    for name, *values in rows:
        cells = ("" if value is None else value if isinstance(value, str) else f"{value:,}" for value in values)
        yield (f"  {name:12}" + "".join(f"{cell:>16}" for cell in cells)).rstrip()


def _ledger_tail(events: Sequence[Event], num_events: int) -> Iterator[str]:
    tail = events[max(0, len(events) - num_events) :]
    if tail:
        yield f"  last {len(tail)} of {len(events):,} removals"
        yield f"  {'event':>8}{'step':>10}  {'type':12}{'index':>10}{'score':>12}{'parameters':>16}"
    for event in tail:
        index = str(event.removed) if isinstance(event.removed, int) else "per layer"
        score = event.scores.get(event.type)
        words = "" if score is None else f"{score:.3e}"
        yield f"  {event.event:>8,}{event.step:>10,}  {event.type:12}{index:>10}{words:>12}{event.parameters:>16,}"


def _kv_heads(kv_groups: tuple[tuple[int, ...], ...]) -> str:
    """Fewest and most of any layer."""
    counts = sorted(len(groups) for groups in kv_groups)
    return str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]}-{counts[-1]}"
