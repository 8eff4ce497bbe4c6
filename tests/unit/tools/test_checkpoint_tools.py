"""tools/inspect_checkpoint.py and tools/reshard_checkpoint.py from the command line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.checkpoint.manifest import complete_text
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.checkpoint.reshard import reshard
from megatron_prune.parallel.fragments import Layout

HoldStates = Callable[..., Any]
Main = Callable[[Sequence[str] | None], int]


def load_main(repo_root: Path, name: str) -> Main:
    spec = importlib.util.spec_from_file_location(f"{name}_tool", repo_root / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Main = module.main
    return main


@pytest.fixture
def inspect_main(repo_root: Path) -> Main:
    return load_main(repo_root, "inspect_checkpoint")


@pytest.fixture
def reshard_main(repo_root: Path) -> Main:
    return load_main(repo_root, "reshard_checkpoint")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, hold_states: HoldStates) -> Path:
    run = tmp_path_factory.mktemp("made") / "run"
    reshard(hold_states(), run, Layout(2), 8)
    (run / "source").mkdir()
    (run / "source" / "config.json").write_text("{}")
    return run


@pytest.fixture
def run_dir(tmp_path: Path, made: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def only_step(run: Path) -> Path:
    (path,) = (run / "checkpoints").iterdir()
    return path


def edit(step: Path, change: Callable[[Any], object]) -> None:
    """Change a manifest, with its checksum."""
    content = json.loads((step / "manifest.json").read_text())
    change(content)
    text = json.dumps(content)
    (step / "manifest.json").write_text(text)
    (step / "COMPLETE").write_text(complete_text(text))


def test_inspect_a_run_and_a_step(run_dir: Path, inspect_main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_main([str(run_dir), "--events", "2"]) == 0
    of_run = capsys.readouterr().out
    assert of_run.startswith("step_00000008           complete\n")
    assert inspect_main([str(only_step(run_dir)), "--events", "2", "--verify"]) == 0
    of_step = capsys.readouterr().out
    assert of_step in of_run + "  verified    every file has its checksum\n"
    assert "last 2 of 4 removals" in of_step


def test_inspect_as_json(run_dir: Path, inspect_main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_main([str(run_dir), "--json", "--verify"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["layout"] == {"tensor": 2, "pipeline": 1, "data": 1}
    assert content["steps"] == [{"name": "step_00000008", "state": "complete", "why": ""}]
    assert content["damaged"] == {}


def test_verify_names_the_damage(run_dir: Path, inspect_main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    shard = only_step(run_dir) / "rank_00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert inspect_main([str(run_dir)]) == 0, "headers are whole"
    capsys.readouterr()
    assert inspect_main([str(run_dir), "--verify"]) == 2
    shown = capsys.readouterr()
    assert "step_00000008           damaged: rank_00001.safetensors" in shown.out
    assert shown.err.count("\n") == 1
    assert shard.name in shown.err
    assert inspect_main([str(run_dir), "--verify", "--json"]) == 2
    assert list(json.loads(capsys.readouterr().out)["damaged"]) == [shard.name]


def test_reshard_makes_a_run_directory(run_dir: Path, tmp_path: Path, reshard_main: Main) -> None:
    moved = tmp_path / "moved"
    flags = ["--tensor-model-parallel-size", "3", "--pipeline-model-parallel-size", "3", "--data-parallel-size", "2"]
    assert reshard_main([str(run_dir), str(moved), *flags, "--prune-align", "1"]) == 0
    assert (moved / "source" / "config.json").read_text() == "{}"
    before, after = Checkpoint(only_step(run_dir)), Checkpoint(only_step(moved))
    assert len(after.shard_names()) == 18
    assert len(after.manifest.partition.stem) == 29
    for spec in before.specs().values():
        assert torch.equal(before.live(spec, "exp_avg"), after.live(spec, "exp_avg"))


def test_an_alignment_beyond_the_model_pads_to_its_widths(run_dir: Path, tmp_path: Path, reshard_main: Main) -> None:
    assert reshard_main([str(run_dir), str(tmp_path / "moved"), "--prune-align", "1000000000000"]) == 0
    partition = Checkpoint(only_step(tmp_path / "moved")).manifest.partition
    assert (len(partition.stem), len(partition.ffn[0][0])) == (30, 44)


@pytest.mark.parametrize("value", ["x", None, -1, 10**30])
def test_an_alignment_that_makes_no_sense_is_one_line(
    run_dir: Path, tmp_path: Path, reshard_main: Main, capsys: pytest.CaptureFixture[str], value: object
) -> None:
    edit(only_step(run_dir), lambda content: content["settings"]["prune"].update(prune_align=value))
    assert reshard_main([str(run_dir), str(tmp_path / "moved")]) == 2
    shown = capsys.readouterr().err
    assert "prune.prune_align" in shown
    assert shown.count("\n") == 1


def test_a_checkpoint_of_another_step_is_not_resharded(
    run_dir: Path, tmp_path: Path, reshard_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    only_step(run_dir).rename(run_dir / "checkpoints" / "step_00000009")
    assert reshard_main([str(run_dir), str(tmp_path / "moved")]) == 2
    assert "is of step 8" in capsys.readouterr().err


def test_damage_shows_in_the_json_of_all_steps(
    run_dir: Path, inspect_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    (only_step(run_dir) / "ledger.jsonl").write_bytes(b"\xff")
    assert inspect_main([str(run_dir), "--json"]) == 2
    content = json.loads(capsys.readouterr().out)
    assert list(content["damaged"]) == ["ledger.jsonl"]
    assert [step["state"] for step in content["steps"]] == ["damaged"]


def test_the_runs_own_alignment_is_the_default(run_dir: Path, tmp_path: Path, reshard_main: Main) -> None:
    assert reshard_main([str(only_step(run_dir)), str(tmp_path / "moved")]) == 0
    assert len(Checkpoint(only_step(tmp_path / "moved")).manifest.partition.ffn[0][0]) == 44, "of 42, aligned to 8"


@pytest.mark.parametrize("with_source", [False, True])
def test_universal_there_and_back(run_dir: Path, tmp_path: Path, reshard_main: Main, with_source: bool) -> None:
    universal, back = tmp_path / "universal", tmp_path / "back"
    assert reshard_main([str(run_dir), "--to-deepspeed-universal", str(universal)]) == 0
    sources = [str(run_dir)] if with_source else []
    assert reshard_main([*sources, str(back), "--from-deepspeed-universal", str(universal)]) == 0
    assert (back / "source").exists() is with_source
    before, after = Checkpoint(only_step(run_dir)), Checkpoint(only_step(back))
    for spec in before.specs().values():
        assert torch.equal(before.live(spec, "exp_avg_sq"), after.live(spec, "exp_avg_sq"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "0 paths"),
        (["RUN"], "1 paths"),
        (["RUN", "new", "more"], "3 paths"),
        (["absent", "new"], "absent"),
        (["RUN", "RUN"], "already holds checkpoints"),
        (["RUN", "new", "--data-parallel-size", "0"], "--data-parallel-size 0"),
        (["RUN", "new", "--prune-align", "0"], "--prune-align 0"),
        (["RUN", "new", "--data-parallel-size", "100000000"], "DP100000000"),
        (["RUN", "new", "--pipeline-model-parallel-size", "9"], "--pipeline-model-parallel-size 9"),
        (["RUN", "new", "--tensor-model-parallel-size", "6"], "--tensor-model-parallel-size 6"),
        (["RUN", "new", "--to-deepspeed-universal", "u"], "takes one path"),
        (["RUN", "--to-deepspeed-universal", "u", "--data-parallel-size", "2"], "any PP and DP"),
        (["RUN", "--to-deepspeed-universal", "u", "--from-deepspeed-universal", "u"], "both"),
        (["new", "--from-deepspeed-universal", "RUN"], "no DeepSpeed universal checkpoint"),
    ],
)
def test_mistakes_are_one_line(
    run_dir: Path,
    tmp_path: Path,
    reshard_main: Main,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reshard_main([str(run_dir) if word == "RUN" else word for word in arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing was begun"


@pytest.mark.parametrize(("arguments", "message"), [(["absent"], "absent"), (["RUN", "--events", "-1"], "--events -1")])
def test_inspect_mistakes_are_one_line(
    run_dir: Path, inspect_main: Main, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert inspect_main([str(run_dir) if word == "RUN" else word for word in arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
