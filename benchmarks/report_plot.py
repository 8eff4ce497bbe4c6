"""The picture of docs/performance.md: how much longer the peers take, and what pruning adds to a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_prune.plotting import DOTS_PER_INCH

#: Columns that hold the time of a peer over ours, and what the column compares where its line does not name a peer.
PEER_COLUMNS = (("time / ours", ""), ("all / ours", ""), ("eager_to_kernel", "eager"), ("compile_to_kernel", "compile"))
#: Parts of the cost of pruning with their colours, Okabe and Ito's.
PARTS = {
    "saliency %": "#0072B2",
    "communication %": "#CC79A7",
    "choice %": "#E69F00",
    "zeroing %": "#009E73",
    "compaction %": "#56B4E9",
}
INCHES_A_BAR = 0.32
WIDTH_INCHES = 9.0
MARK_COLOUR = "#7F7F7F"
#: A table by the name of its run, as :func:`timing.write_json` wrote it.
Tables = Mapping[str, Mapping[str, Any]]


def draw(tables: Tables, path: Path) -> bool:
    """Write the picture; False, and no picture, without anything to show."""
    peers, costs = peer_ratios(tables), cost_rows(tables)
    path.unlink(missing_ok=True)
    counts = [len(rows) for rows in (peers, costs) if rows]
    if not counts:
        return False
    height = sum(1.3 + INCHES_A_BAR * count for count in counts)
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    panels = figure.subplots(len(counts), squeeze=False, height_ratios=[count + 3 for count in counts]).flatten()
    if peers:
        _draw_peers(panels[0], peers)
    if costs:
        _draw_costs(panels[-1], costs)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return True


def peer_ratios(tables: Tables) -> list[tuple[str, Mapping[str, float]]]:
    """Label and spread of every peer's time over ours."""
    found = []
    for name, table in tables.items():
        for row in table["rows"]:
            for column, peer in PEER_COLUMNS:
                # Of the kernels, the matrix that has a target stands for the others.
                if isinstance(row.get(column), dict) and row.get("side") != "ours" and row.get("eager_target") != "-":
                    what = row["side"] if not peer else f"{peer}, {row['matrix']} {row['dtypes']}"
                    found.append((f"{what} ({name.replace('_', ' ')})", row[column]))
    return found


def cost_rows(tables: Tables) -> list[tuple[str, Mapping[str, Any]]]:
    """Label and line of every measured cost of pruning."""
    return [
        (f"{row['ratio']} ({name.replace('_', ' ')})", row)
        for name, table in tables.items()
        for row in table["rows"]
        if set(PARTS) <= set(row)
    ]


def _draw_peers(axes: Any, peers: Sequence[tuple[str, Mapping[str, float]]]) -> None:
    labels, spreads = [label for label, _ in peers], [spread for _, spread in peers]
    middle = [spread["median"] for spread in spreads]
    below = [spread["median"] - spread["low"] for spread in spreads]
    above = [spread["high"] - spread["median"] for spread in spreads]
    axes.barh(labels, middle, xerr=(below, above), color="#56B4E9", ecolor="#000000", capsize=3)
    axes.axvline(1.0, color=MARK_COLOUR, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("time of the peer / time of this project")
    axes.invert_yaxis()


def _draw_costs(axes: Any, costs: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    labels = [label for label, _ in costs]
    left = [0.0] * len(costs)
    for part, colour in PARTS.items():
        shares = [float(row[part]) for _, row in costs]
        axes.barh(labels, shares, left=left, color=colour, label=part.removesuffix(" %"))
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.set_xlabel("cost of pruning, % of a step, by units pruned : steps")
    axes.legend(fontsize="small")
    axes.invert_yaxis()
