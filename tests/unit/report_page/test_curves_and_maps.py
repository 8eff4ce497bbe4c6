"""Curves stay short and keep their extremes; a map's cells are the ledger's removals, counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prune.pruning.ledger import Event
from megatron_prune.report_page.curves import charts, end_of_pruning, thinned
from megatron_prune.report_page.maps import heat_maps
from megatron_prune.report_page.records import Run, read_run

VALUES = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path]) -> Run:
    return read_run(make_run(tmp_path_factory.mktemp("runs") / "run"))


@settings(max_examples=60)
@given(VALUES, st.integers(4, 60))
def test_thinning_keeps_order_ends_and_extremes(values: list[float | None], most: int) -> None:
    x = [float(place) for place in range(len(values))]
    short_x, short_y = thinned(x, values, most)
    assert len(short_x) == len(short_y) <= most or len(values) <= most
    assert short_x == sorted(set(short_x))
    assert (short_x[0], short_x[-1]) == (0, len(values) - 1)
    assert all(values[int(at)] == value for at, value in zip(short_x, short_y, strict=True))
    there = [value for value in values if value is not None]
    if there:
        kept = [value for value in short_y if value is not None]
        assert (min(kept), max(kept)) == (min(there), max(there))


def test_a_gap_stays_one() -> None:
    values: list[float | None] = [1.0] * 100 + [None] * 100 + [2.0] * 100
    assert None in thinned(list(map(float, range(300))), values, 20)[1]


def test_the_running_mean_leaves_gaps_out(run: Run) -> None:
    lines = [{"step": step, "tokens": step, "loss": None if step % 7 == 0 else step % 5} for step in range(1, 501)]
    mean = next(chart for chart in charts(dataclasses.replace(run, training=lines)) if chart.id == "loss").curves[1]
    losses = [line["loss"] for line in lines]
    for end in (1, 9, 10, 11, 500):
        there = [loss for loss in losses[max(0, end - 10) : end] if loss is not None]
        assert mean.y[end - 1] == pytest.approx(sum(there) / len(there))


def test_curves_are_the_files_numbers(run: Run) -> None:
    by_id = {chart.id: chart for chart in charts(run)}
    heads = by_id["shape-attention"].curves[0]
    assert (heads.x[0], heads.y[0]) == (0, 12)
    assert (heads.x[-1], heads.y[-1]) == (run.last_tokens, run.events[-1].shape["num_attention_heads"])
    for event in run.events:
        assert event.parameters in by_id["parameters"].curves[0].y
    assert [curve.name for curve in by_id["saliency"].curves] == ["attention head", "FFN channel", "stem channel"]
    assert list(by_id["saliency"].curves[1].y) == [event.scores["ffn"] for event in run.events]
    assert list(by_id["loss"].curves[0].y) == [line["loss"] for line in run.training]
    assert by_id["memory"].curves[0].y[0] == pytest.approx(run.training[0]["memory_bytes"] / 2**30)
    assert all(chart.drawn for chart in by_id.values())
    assert end_of_pruning(run) == run.events[-1].tokens


def test_maps_count_every_removal_once(run: Run) -> None:
    heads, ffn, stem = heat_maps(run)
    for found, kind, layers in ((heads, "attention", 12), (ffn, "ffn", 12), (stem, "stem", 1)):
        events = [event for event in run.events if event.type == kind]
        assert len(found.removed) == layers
        for row in range(layers):
            assert sum(found.removed[row]) == len(events)
            for column, (first, end) in enumerate(zip(found.bounds, found.bounds[1:], strict=False)):
                inside = [event for event in events if first <= event.group.indices(row)[0] < end]
                assert found.removed[row][column] == len(inside)
                assert found.when[row][column] == (inside[-1].step if inside else None)


def test_several_heads_at_once_are_all_counted(run: Run) -> None:
    event = Event(1, 7, 70, "attention", [[0, 5]] * 12, {}, {"num_attention_heads": 10}, 1000)
    balanced = Run(run.directory, (), (), (event,), None, run.source, (), (), run.state, ())
    heads = heat_maps(balanced)[0]
    assert heads.removed == [[1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]] * 12
    assert balanced.source_width("attention") == 12


@pytest.mark.parametrize("width", [1, 63, 64, 65, 1000, 4097])
def test_columns_hold_what_their_bounds_say(run: Run, width: int) -> None:
    events = tuple(
        Event(place + 1, place, place, "ffn", [place], {}, {"ffn_hidden_size": width - place - 1}, 10)
        for place in range(width)
    )
    found = heat_maps(Run(run.directory, (), (), events, None, None, (), (), run.state, ()))[1]
    assert len(found.removed[0]) == min(width, 64)
    assert found.removed[0] == [end - first for first, end in zip(found.bounds, found.bounds[1:], strict=False)]
