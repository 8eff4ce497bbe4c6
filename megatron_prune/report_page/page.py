"""Puts the page together: markup from here, looks and drawing from page.css and page.js, all in one file."""

from __future__ import annotations

import datetime
import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Final

from megatron_prune.config.yaml_file import dump_yaml
from megatron_prune.report_page.curves import MAX_POINTS, Chart, charts, end_of_pruning
from megatron_prune.report_page.maps import HeatMap, heat_maps
from megatron_prune.report_page.records import Export, Run, number
from megatron_prune.report_page.summary import summary
from megatron_prune.training.run_dir import replace_text

#: Nothing but what stands in the file itself: a browser refuses all else, whatever a run's name says.
POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
#: Lines before a snapshot whose mean its training loss is.
LOSS_LINES: Final = 5


def write_page(run: Run, path: Path, reload_seconds: float | None = None) -> None:
    """Write the page; what was there stays until the new one is whole.

    Args:
        run: from :func:`~megatron_prune.report_page.records.read_run`.
        path: the file.
        reload_seconds: after which the page loads itself again while the run is running, or None.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, page(run, reload_seconds))


def page(run: Run, reload_seconds: float | None = None) -> str:
    """The page as text; see :func:`write_page`."""
    drawn, maps = charts(run), heat_maps(run)
    mark, end = end_of_pruning(run), float(max(run.last_tokens, 1))
    data = {
        "charts": [chart.data(mark, end) for chart in drawn if chart.drawn],
        "maps": [one.data() for one in maps if one.drawn],
    }
    refresh = ""
    if reload_seconds is not None and run.state.name == "running":
        refresh = f'<meta http-equiv="refresh" content="{max(1, round(reload_seconds))}">\n'
    name = html.escape(run.directory.resolve().name)
    folder = resources.files(__package__)
    style, script = (folder.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{refresh}'
        f"<title>{name}: {run.state.name}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"{summary(run, name)}"
        '<noscript><p class="note">The curves are drawn by a script in this file; allow it to run.</p></noscript>\n'
        f"<main>\n{_panels(drawn, maps)}{_exports(run)}{_settings(run)}</main>\n{_footer(run, drawn)}"
        f'<script type="application/json" id="data">{_embedded(data)}</script>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _embedded(data: object) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _panels(drawn: Sequence[Chart], maps: Sequence[HeatMap]) -> str:
    parts = [_panel(chart.id, chart.title, chart.drawn, chart.empty, "wide" if chart.wide else "") for chart in drawn]
    parts += [_panel(one.id, one.title, one.drawn, one.empty, "wide map") for one in maps]
    return "".join(parts)


def _panel(name: str, title: str, drawn: bool, empty: str, kind: str) -> str:
    inside = '<div class="drawing"></div>' if drawn else f'<p class="empty">{html.escape(empty)}</p>'
    return f'<section class="panel {kind}" id="{name}">\n<h2>{html.escape(title)}</h2>\n{inside}\n</section>\n'


def _exports(run: Run) -> str:
    if run.exports:
        heads = ("budget", "state", "parameters", "hidden / FFN / heads", "step", "training loss", "validation", "path")
        rows = "".join(_export_row(run, export) for export in run.exports)
        titles = "".join(f'<th scope="col">{head}</th>' for head in heads)
        inside = f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table></div>'
    else:
        inside = '<p class="empty">None, and none asked for: --export-at names budgets at which to write one.</p>'
    return f'<section class="panel wide" id="exports">\n<h2>Exports so far</h2>\n{inside}\n</section>\n'


def _export_row(run: Run, export: Export) -> str:
    event = export.crossed
    cells = [export.name, "written" if export.written else ("not there" if event else "to come")]
    if event is None:
        cells += ["", "", "", "", ""]
    else:
        shape = [event.shape.get(key, "?") for key in ("hidden_size", "ffn_hidden_size", "num_attention_heads")]
        cells += [f"{event.parameters:,}", " / ".join(map(str, shape)), f"{event.step:,}"]
        cells += [_training_loss(run, event.step), _validation_loss(run, event.step)]
    cells.append(export.path if export.written else "")
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _training_loss(run: Run, step: int) -> str:
    """Mean of the lines up to a step."""
    before = [line for line in run.training if line["step"] <= step][-LOSS_LINES:]
    losses = [loss for line in before if (loss := number(line.get("loss"))) is not None]
    return f"{sum(losses) / len(losses):.3f}" if losses else "no line before it"


def _validation_loss(run: Run, step: int) -> str:
    """The first at that step or after it, and at which."""
    later = next((line for line in run.validation if line["step"] >= step), None)
    return "none since" if later is None else f"{later['val_loss']:.3f} at step {later['step']:,}"


def _settings(run: Run) -> str:
    if run.config is None:
        inside = '<p class="empty">config.yaml is missing or cannot be read.</p>'
    else:
        inside = f"<details><summary>config.yaml</summary><pre>{html.escape(dump_yaml(run.config))}</pre></details>"
    return f'<section class="panel wide" id="settings">\n<h2>Settings</h2>\n{inside}\n</section>\n'


def _footer(run: Run, drawn: Sequence[Chart]) -> str:
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    sentences = [f"Written {now} from {run.directory.name}: {len(run.events):,} removals."]
    if any(len(curve.x) > MAX_POINTS for chart in drawn for curve in chart.curves):
        sentences.append(f"Longer curves are thinned to {MAX_POINTS:,} points, the extremes of equal stretches.")
    sentences += [f"{note}." for note in run.notes]
    return f"<footer><p>{html.escape(' '.join(sentences))}</p></footer>\n"
