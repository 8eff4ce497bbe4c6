"""Where a run stops, for budgets other than the paper's."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.architecture import Architecture
from megatron_prune.config import Config, TargetShape, floor_shape, parse_source_shape, shape_between
from megatron_prune.config.targets import reachable_heads
from megatron_prune.config.yaml_file import with_values
from megatron_prune.errors import UserError
from megatron_prune.pruning.groups import MiniGroup
from megatron_prune.pruning.ledger import Event, Ledger, shape_of
from megatron_prune.pruning.replay import removed_at_once
from megatron_prune.stops import stops, units_between, units_range

GROUPED = parse_source_shape("hidden=6,ffn=7,heads=6,kv_heads=2,head_dim=2,layers=2,vocab=11,tied=1")


def settings(**values: Any) -> Config:
    return with_values(Config(), {"prune_align": 1, "gqa_mode": "balanced"} | values)


def target(config: Config) -> tuple[Architecture, tuple[int, int]]:
    *_, stop = stops(config, GROUPED)
    assert stop.name == "target"
    return stop.arch, stop.units


def widths(arch: Architecture) -> tuple[int, int, int]:
    return arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads


def ends(config: Config, budget: int) -> set[int]:
    """Units of every shape at which a search can end, by walking all ways down."""
    floor, heads, align = (
        floor_shape(config.prune, GROUPED),
        reachable_heads(GROUPED, "balanced"),
        config.prune.final_align,
    )
    found, seen, stack = set(), set(), [widths(GROUPED)]
    while stack:
        shape = stack.pop()
        if shape in seen:
            continue
        seen.add(shape)
        met = shape_between(GROUPED, *shape, "balanced").num_parameters() <= budget
        late = [axis for axis, size in enumerate((shape[0], shape[1], shape[2] * GROUPED.head_dim)) if size % align]
        if met and not late:
            found.add(units_between(GROUPED, TargetShape(*shape)))
        for axis in late if met else range(3):
            narrower = list(shape)
            narrower[axis] = shape[axis] - 1 if axis < 2 else max([h for h in heads if h < shape[2]], default=0)
            if narrower[axis] >= floor[axis]:
                stack.append((narrower[0], narrower[1], narrower[2]))
    return found


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6, 0.4])
def test_balanced_bounds_against_every_way_down(share: float) -> None:
    config = settings()
    budget = int(GROUPED.num_parameters() * share)
    found = ends(config, budget)
    assert units_range(GROUPED, floor_shape(config.prune, GROUPED), budget, "balanced") == (min(found), max(found))


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6])
def test_an_aligned_end_is_within_the_bounds(share: float) -> None:
    config = settings(target_params=str(int(GROUPED.num_parameters() * share)), final_align=2)
    arch, (fewest, most) = target(config)
    found = ends(config, int(GROUPED.num_parameters() * share))
    assert fewest <= min(found) <= max(found) <= most
    assert (arch.hidden_size % 2, arch.ffn_hidden_size % 2, arch.num_attention_heads * 2 % 2) == (0, 0, 0)
    assert fewest <= units_between(GROUPED, TargetShape(*widths(arch))) <= most


def test_a_cache_budget_is_known_beforehand() -> None:
    per_head = GROUPED.kv_bytes_per_token() // 2
    arch, bounds = target(settings(target_kv_bytes=str(per_head)))
    assert widths(arch) == (6, 7, 1)
    assert bounds == (10, 10)  # five heads of two channels
    arch, _ = target(settings(target_kv_bytes=str(2 * per_head - 1)))
    assert widths(arch) == (6, 7, 1)


def test_a_latency_may_take_all_down_to_the_floor() -> None:
    arch, (fewest, most) = target(settings(target_latency_ms=1.0, prune_align=2))
    assert widths(arch) == (2, 2, 1)
    assert (fewest, most) == (1, 2 * 4 + 5 + 2 * 5)


def ledger(path: Path) -> list[Event]:
    groups = [
        MiniGroup("stem", 3),
        MiniGroup("ffn", (0, 6)),
        MiniGroup("attention", ((0, 5), (2, 3))),
        MiniGroup("stem", 1),
    ]
    written = Ledger(path)
    for number in itertools.count(1):
        if number > len(groups):
            return written.events
        arch = removed_at_once(GROUPED, groups[:number]).architecture()
        group = groups[number - 1]
        written.append(Event(number, 0, 0, group.type, group.listed(), {}, shape_of(arch), arch.num_parameters()))
    raise AssertionError


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_replay_ends_with_the_ledger_or_at_the_target(tmp_path: Path, number: int) -> None:
    events = ledger(tmp_path / "ledger.jsonl")
    replay = str(tmp_path / "ledger.jsonl")
    arch, bounds = target(settings(replay=replay, target_params=str(events[number - 1].parameters)))
    assert shape_of(arch) == dict(events[number - 1].shape)
    assert bounds == ((2, 3, 7, 9)[number - 1],) * 2
    whole, _ = target(settings(replay=replay))
    assert shape_of(whole) == dict(events[-1].shape)
    export, _ = stops(settings(replay=replay, export_at=(str(events[number - 1].parameters),)), GROUPED)
    assert (shape_of(export.arch), export.units) == (dict(events[number - 1].shape), bounds)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"target_params": "399"}, "--target-params 399 is beyond --replay"),
        ({"target_shape": "hidden=3"}, "--target-shape hidden=3 is beyond --replay"),
        ({"target_kv_bytes": "16"}, "--target-kv-bytes 16 is beyond --replay"),
        ({"export_at": ("500", "399")}, "--export-at 399 is beyond --replay"),
        ({"target_params": "500", "export_at": ("399",)}, "--export-at 399 is beyond --replay"),
        ({"target_shape": "ffn=6", "export_at": ("500",)}, "--export-at 500 is below the 580 parameters"),
    ],
)
def test_what_a_ledger_does_not_reach_is_refused(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    assert ledger(tmp_path / "ledger.jsonl")[-1].parameters == 400
    with pytest.raises(UserError, match=words) as error:
        list(stops(settings(replay=str(tmp_path / "ledger.jsonl"), **values), GROUPED))
    assert "is below" in words or "which ends at 400 parameters (hidden=4,ffn=6,heads=4)" in str(error.value)
