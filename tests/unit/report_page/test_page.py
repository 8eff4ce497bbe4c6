"""The page as text: every panel, nothing from elsewhere, no larger for a longer run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prune.report_page.page import page, write_page
from megatron_prune.report_page.records import Run, read_run
from megatron_prune.training.run_dir import locked

CURVES = ("shape-attention", "shape-ffn", "shape-stem", "parameters", "saliency", "loss", "throughput", "memory")
PANELS = (*CURVES, "learning-rate", "gradient", "map-heads", "map-ffn", "map-stem", "exports", "settings")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path]) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a&b</script>", upto=160)


@pytest.fixture(scope="module")
def run(run_dir: Path) -> Run:
    return read_run(run_dir)


def _panels(text: str) -> list[str]:
    return re.findall(r'<section class="panel[^"]*" id="([^"]+)"', text)


def test_every_panel_is_there_with_data_or_without(run: Run) -> None:
    assert _panels(page(run)) == list(PANELS)
    nothing = Run(run.directory, (), (), (), None, None, (), (), run.state, ("a note",))
    bare = page(nothing)
    assert _panels(bare) == list(PANELS)
    assert bare.count('class="empty"') == len(PANELS)
    assert "a note." in bare


def test_what_is_not_recorded_is_said(run: Run) -> None:
    without = [{key: value for key, value in line.items() if key != "memory_bytes"} for line in run.training]
    text = page(dataclasses.replace(run, training=without))
    memory = text[text.index('id="memory"') : text.index('id="learning-rate"')]
    assert "Not recorded" in memory


def test_nothing_comes_from_elsewhere(run: Run) -> None:
    text = page(run)
    assert not re.search(r"https?:|\bsrc\s*=|\bhref\s*=|url\(|@import|\bfetch\(|XMLHttp|WebSocket", text)
    assert "default-src 'none'" in text


def test_names_cannot_become_markup(run: Run) -> None:
    text = page(run)
    assert "a&amp;b&lt;" not in text.replace("a&amp;b&lt;/script&gt;", "")
    assert text.count("</script>") == 2


def test_it_reloads_only_while_the_run_runs_and_is_watched(run_dir: Path, run: Run) -> None:
    refresh = '<meta http-equiv="refresh" content="30">'
    assert refresh not in page(run, 30)
    with locked(run_dir):
        running = read_run(run_dir)
    assert refresh in page(running, 30)
    assert "refresh" not in page(running)


def test_the_head_tells_state_progress_and_time(run_dir: Path) -> None:
    with locked(run_dir):
        text = page(read_run(run_dir))
    head = text[text.index("<header>") : text.index("</header>")]
    for words in ("running", "160 of 400", "left", "40%", "800k parameters, 1.1M now", "58%", "of 1,427,808"):
        assert words in head, words


def test_exports_have_their_loss(run: Run) -> None:
    text = page(run)
    table = text[text.index('id="exports"') : text.index('id="settings"')]
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(<td>.*?)</tr>", table)]
    assert [row[:2] for row in rows] == [["1.3M", "written"], ["1.1M", "written"], ["850K", "to come"]]
    crossed = run.exports[0].crossed
    assert crossed is not None
    losses = [line["loss"] for line in run.training if line["step"] <= crossed.step][-5:]
    assert rows[0][5] == f"{sum(losses) / 5:.3f}"
    later = next(line for line in run.validation if line["step"] >= crossed.step)
    assert rows[0][6] == f"{later['val_loss']:.3f} at step {later['step']}"
    assert rows[0][7] == "exports/1.3M"
    assert rows[2][2:] == [""] * 6


def test_a_long_run_makes_no_large_page(run: Run) -> None:
    """Eight thousand lines and removals: as many as the paper's longest run."""
    lines = [{**run.training[0], "step": step, "tokens": step * 512} for step in range(1, 8_001)]
    first = run.events[0]
    events = [dataclasses.replace(first, event=step, step=step, tokens=step * 512) for step in range(1, 8_001)]
    text = page(dataclasses.replace(run, training=lines, events=events))
    assert len(text) < 600_000
    assert "thinned to 1,000 points" in text


def test_a_write_that_fails_leaves_the_old_page(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "run.html"
    write_page(run, file)
    before = file.read_text()
    monkeypatch.setattr(Path, "replace", _fail)
    with pytest.raises(OSError, match="full"):
        write_page(run, file)
    assert file.read_text() == before
    assert [path.name for path in file.parent.iterdir()] == ["run.html"]


def _fail(self: Path, target: Path) -> None:
    raise OSError("full")
