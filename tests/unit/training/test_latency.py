"""The table of latencies: what is timed, what is kept, what is interpolated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.architecture import Architecture
from megatron_prune.config import Config, parse_source_shape
from megatron_prune.config.yaml_file import with_values
from megatron_prune.errors import UserError
from megatron_prune.parallel.mesh import Mesh
from megatron_prune.training import latency
from megatron_prune.training.latency import LATENCY_FILE, decode_ms, latency_table, measured_table, read_table
from megatron_prune.training.targets import make_budget

SOURCE = parse_source_shape("hidden=48,ffn=96,heads=6,kv_heads=3,head_dim=8,layers=2,vocab=64,tied=1")


def settings(run: Path, **values: Any) -> Config:
    base = {"save": str(run), "prune_align": 16, "gqa_mode": "balanced", "target_latency_ms": 2.0, "seq_length": 24}
    return with_values(Config(), base | values)


def pretended(arch: Architecture) -> float:
    """Milliseconds that are exact under interpolation between heads 1, 3 and 6."""
    kv_heads = arch.num_query_groups
    return 1 + arch.hidden_size * (arch.ffn_hidden_size + 16 * (arch.num_attention_heads + kv_heads)) / 5e3


class Timer:
    """Counts the shapes it is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[Architecture] = []
        monkeypatch.setattr(latency, "decode_ms", self)

    def __call__(self, arch: Architecture, context: int, dtype: torch.dtype, device: torch.device) -> float:
        assert (context, dtype) == (24, torch.bfloat16)
        self.shapes.append(arch)
        return pretended(arch)


@pytest.fixture
def mesh() -> Mesh:
    """Of one process, which needs no group."""
    group: Any = None
    return Mesh(0, 1, 0, 1, None, 0, 1, None, 0, 1, None, None, group, torch.device("cpu"))


def test_the_minutes_of_timing_are_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = measured_table(settings(tmp_path), SOURCE, pretended)
    assert capsys.readouterr().out.startswith(f"timing {table.milliseconds.size} shapes, 3 times each")


def test_shapes_between_the_source_and_the_floor_are_timed(tmp_path: Path) -> None:
    table = measured_table(settings(tmp_path), SOURCE, pretended)
    assert (table.hidden[0], table.hidden[-1]) == (16, 48)
    assert (table.ffn[0], table.ffn[-1]) == (16, 96)
    assert {1, 3, 6} <= set(table.heads) <= {1, 2, 3, 6}  # balanced passes through no others; K/V heads go below 3
    assert table.milliseconds_of(48, 96, 6) == pretended(SOURCE)
    assert table.milliseconds_of(31, 57, 3) == pytest.approx(1 + 31 * (57 + 16 * 6) / 5e3)


def test_an_axis_that_stays_is_not_varied(tmp_path: Path) -> None:
    table = measured_table(settings(tmp_path, prune_axes=("ffn",)), SOURCE, pretended)
    assert (table.hidden, table.heads) == ((48,), (6,))


def test_a_run_measures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mesh: Mesh) -> None:
    timer, config = Timer(monkeypatch), settings(tmp_path / "run")
    first = latency_table(config, SOURCE, mesh, None)
    number = len(timer.shapes)
    again = latency_table(config, SOURCE, mesh, None)
    # Goes on in another directory: the table goes with it.
    moved = latency_table(settings(tmp_path / "branch"), SOURCE, mesh, tmp_path / "run")
    assert len(timer.shapes) == number
    assert first.to_dict() == again.to_dict() == moved.to_dict()
    assert read_table(tmp_path / "branch") is not None


def test_other_settings_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mesh: Mesh) -> None:
    timer = Timer(monkeypatch)
    latency_table(settings(tmp_path), SOURCE, mesh, None)
    number = len(timer.shapes)
    latency_table(settings(tmp_path, prune_align=8), SOURCE, mesh, None)
    assert len(timer.shapes) > number


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / LATENCY_FILE).write_text('{"hidden": [1, 2]}')
    with pytest.raises(UserError, match="latency.json is no latency table .*; delete it to measure again"):
        read_table(tmp_path)


@pytest.mark.parametrize("asked", [0.5, 3.5])
def test_a_latency_out_of_reach_is_refused(tmp_path: Path, asked: float) -> None:
    config = settings(tmp_path, target_latency_ms=asked)
    table = measured_table(config, SOURCE, pretended)
    with pytest.raises(UserError, match=f"--target-latency-ms {asked} is not between the 1.15 ms"):
        make_budget(config, SOURCE, None, lambda: table)


def test_the_budget_goes_by_the_table(tmp_path: Path) -> None:
    config = settings(tmp_path)
    budget = make_budget(config, SOURCE, None, lambda: measured_table(config, SOURCE, pretended))
    assert budget is not None
    assert budget.excess(SOURCE) == pytest.approx(pretended(SOURCE) - 2.0)
    assert not budget.met(SOURCE)


@pytest.mark.parametrize("kind", ["", ",qkv_bias=1", ",qk_norm=1"])
def test_a_random_model_of_a_shape_decodes(kind: str) -> None:
    source = "hidden=20,ffn=12,heads=3,kv_heads=3,head_dim=8,layers=2,vocab=64,tied=1"  # llama as mistral: 20 % 3
    assert decode_ms(parse_source_shape(source + kind), 5, torch.float32, torch.device("cpu")) > 0
