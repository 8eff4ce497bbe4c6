"""The parts of tools/demo.py that need no training, and the agreement of the demo's settings files."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megatron_prune.config.cli import load_config
from megatron_prune.config.schema import Config
from megatron_prune.config.validate import validate_against_source, validate_config
from megatron_prune.config.values import parse_count

LARGEST_SHARE_LEFT = 0.4


def _load_tool(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.stem}_tool", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo(repo_root: Path) -> Iterator[ModuleType]:
    module = _load_tool(repo_root / "tools" / "demo.py")
    yield module
    del sys.modules[module.__name__]


def _settings(repo_root: Path, name: str) -> Config:
    return load_config(["--config", str(repo_root / "examples" / "demo" / f"{name}.yaml")])


@pytest.mark.parametrize("name", ["source", "prune", "direct"])
def test_settings_are_valid(repo_root: Path, name: str) -> None:
    validate_config(_settings(repo_root, name), world_size=1)


def test_baseline_sees_the_same_tokens(repo_root: Path) -> None:
    prune, direct = _settings(repo_root, "prune"), _settings(repo_root, "direct")
    assert direct.data == prune.data
    assert direct.train == prune.train
    assert not direct.prune.active


def test_held_out_text_is_the_source_s_too(repo_root: Path) -> None:
    prune, source = _settings(repo_root, "prune"), _settings(repo_root, "source")
    assert (source.data.split, source.data.seq_length) == (prune.data.split, prune.data.seq_length)


def test_at_least_sixty_percent_are_pruned(repo_root: Path) -> None:
    make_source = _load_tool(repo_root / "tools" / "make_demo_source.py")
    architecture = make_source.architecture(make_source.VOCAB_SIZE)
    settings = _settings(repo_root, "prune")
    validate_against_source(settings, architecture)
    assert settings.prune.target_params is not None
    assert parse_count(settings.prune.target_params) <= LARGEST_SHARE_LEFT * architecture.num_parameters()


def test_table_is_aligned(demo: ModuleType) -> None:
    rows = [demo.Row("source", 1066112, "128 / 352 / 4", 10240000, 2.25), demo.Row("x", 7, "1 / 1 / 1", 9, 11.5)]
    *table, note = demo._table(rows)
    assert len({len(line) for line in table}) == 1
    assert table[2].split() == ["source", "1,066,112", "128", "/", "352", "/", "4", "10,240,000", "2.250"]
    assert table[3].endswith("  11.500")
    assert "One run, one seed" in note


def test_a_source_without_weights_keeps_everything_else(demo: ModuleType, tmp_path: Path) -> None:
    model, copy = tmp_path / "model", tmp_path / "copy"
    model.mkdir()
    kept, dropped = ("config.json", "tokenizer.json"), ("model-1.safetensors", "model.safetensors.index.json")
    for name in (*kept, *dropped):
        (model / name).write_text(name)
    copy.mkdir()
    (copy / "stale.json").write_text("from an earlier run")
    demo._without_weights(model, copy)
    assert sorted(path.name for path in copy.iterdir()) == sorted(kept)


def test_tokens_trained_is_the_last_step_s(demo: ModuleType, tmp_path: Path) -> None:
    records = [{"step": 1, "tokens": 8}, {"step": 2, "tokens": 16, "val_loss": 3.0}, {"event": "compaction"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert demo._tokens_trained(tmp_path) == 16


def test_a_failing_command_ends_the_demo_with_its_code(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "fail.py"
    script.write_text("import sys; sys.exit(75)")
    with pytest.raises(SystemExit) as stopped:
        demo.Stages(total=1).run(script, "--flag")
    assert stopped.value.code == 75
    printed = capsys.readouterr()
    assert printed.out == f"$ python {script} --flag\n"
    assert "exit code 75" in printed.err
