"""Shapes for direct pretraining: as large as the budget allows, and configs that read back as the same model."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
from pathlib import Path

import pytest

from megatron_prune.baselines import baseline_shapes, write_config
from megatron_prune.checkpoint.hf import architecture_from_hf, has_weights, read_architecture
from megatron_prune.config import parse_source_shape, shape_between
from megatron_prune.config.targets import reachable_heads
from megatron_prune.errors import UserError

SMOLLM = "hidden=2048,ffn=8192,heads=32,kv_heads=32,head_dim=64,layers=24,vocab=49152,tied=1"
GQA = "hidden=960,ffn=2560,heads=15,kv_heads=5,head_dim=64,layers=32,vocab=49152,tied=1"
BUDGET = 457_000_000


def test_the_shapes_of_the_paper() -> None:
    source = parse_source_shape(SMOLLM)
    shapes = baseline_shapes(source, BUDGET, (1195, 3006, 19))
    assert list(shapes) == ["hidden_only", "uniform", "searched"]
    hidden, uniform, searched = shapes.values()
    assert (hidden.ffn_hidden_size, hidden.num_attention_heads) == (8192, 32)
    ratios = [
        uniform.hidden_size / 2048,
        uniform.ffn_hidden_size / 8192,
        uniform.num_attention_heads / 32,
        uniform.num_query_groups / 32,
    ]
    assert max(ratios) - min(ratios) < 0.02
    assert (searched.hidden_size, searched.ffn_hidden_size, searched.num_attention_heads) == (1195, 3006, 19)
    for shape in shapes.values():
        assert 0.99 * BUDGET < shape.num_parameters() <= BUDGET
        assert shape.uniform_kv
    assert dataclasses.replace(hidden, hidden_size=hidden.hidden_size + 1).num_parameters() > BUDGET


def test_grouped_attention_keeps_whole_groups() -> None:
    source = parse_source_shape(GQA)
    for budget in (100_000_000, 134_000_000, 300_000_000):
        shapes = baseline_shapes(source, budget, (757, 966, 5))
        assert shapes["hidden_only"].num_query_groups == 5
        uniform = shapes["uniform"]
        assert uniform.num_attention_heads == 3 * uniform.num_query_groups
        assert shapes["searched"].num_query_groups == 5  # 3.7 are left in the mean, and 1 and 5 divide 5


def test_balanced_shapes_are_ones_it_passes_through() -> None:
    source = parse_source_shape(GQA)
    passed = reachable_heads(source, "balanced")
    for heads, budget in itertools.product((10, 5, 4), (134_000_000, 250_000_000)):
        shapes = baseline_shapes(source, budget, (757, 966, heads), "balanced")
        assert shapes["searched"] == shape_between(source, 757, 966, heads, "balanced")
        for shape in shapes.values():
            assert shape.num_attention_heads in passed
            assert shape.num_query_groups == min(shape.num_attention_heads, 5)
            assert shape.uniform_kv


def test_a_budget_below_every_shape_is_an_error() -> None:
    with pytest.raises(UserError, match="--target-params"):
        baseline_shapes(parse_source_shape(SMOLLM), 1000, None)


def test_configs_read_back(tmp_path: Path) -> None:
    for source in (SMOLLM, GQA):
        for name, arch in baseline_shapes(parse_source_shape(source), 134_000_000, (757, 966, 5)).items():
            write_config(tmp_path / name, arch, {"eos_token_id": 7})
            config = json.loads((tmp_path / name / "config.json").read_text())
            assert config["eos_token_id"] == 7
            read = architecture_from_hf(config)
            assert read.num_parameters() == arch.num_parameters()
            assert read.kv_groups == arch.kv_groups


def test_the_tool_writes_them(repo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("plan_tool", repo_root / "tools" / "plan.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    flags = ["--source-shape", SMOLLM, "--write-config", str(tmp_path)]
    assert tool.main([*flags, "--target-shape", "hidden=1195,ffn=3006,heads=19"]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hidden_only", "searched", "uniform"]
    for name in ("hidden_only", "searched", "uniform"):
        arch = read_architecture(tmp_path / name)
        assert f"{arch.num_parameters():,} parameters" in printed
        assert not has_weights(tmp_path / name)
    source = parse_source_shape(GQA)
    balanced = ["--source-shape", GQA, "--gqa-mode", "balanced", "--write-config", str(tmp_path / "balanced")]
    assert tool.main([*balanced, "--target-shape", "hidden=757,ffn=966,heads=4"]) == 0
    wanted = shape_between(source, 757, 966, 4, "balanced").num_parameters()
    assert read_architecture(tmp_path / "balanced" / "searched").num_parameters() == wanted
    for name in ("hidden_only", "uniform"):
        assert 0.97 * wanted < read_architecture(tmp_path / "balanced" / name).num_parameters() <= wanted
    assert tool.main(flags) == 2
    assert "--target-params" in capsys.readouterr().err
