"""Descriptions of checkpoints say what was saved, and damage is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import sign

from megatron_prune.checkpoint.files import sha256_file
from megatron_prune.checkpoint.inspect import damages, describe, description_dict, find_step, run_steps
from megatron_prune.checkpoint.inspect_text import format_description
from megatron_prune.checkpoint.reshard import reshard
from megatron_prune.errors import UserError
from megatron_prune.parallel.fragments import Layout

HoldStates = Callable[..., Any]
FILES = ["COMPLETE", "manifest.json", "ledger.jsonl", "rank_00000.safetensors", "rank_00003.safetensors"]


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, hold_states: HoldStates) -> Path:
    run = tmp_path_factory.mktemp("made")
    reshard(hold_states(), run, Layout(2, 1, 2), 8)
    return run


@pytest.fixture
def step(tmp_path: Path, made: Path) -> Path:
    """A copy to damage; a directory of its own, for making one syncs every file."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "checkpoints" / "step_00000008"


def test_numbers_are_the_runs(step: Path, hold_states: HoldStates) -> None:
    saved = hold_states()
    found = describe(step)
    now = saved.manifest.partition.architecture().num_parameters()
    source = saved.manifest.partition.source.num_parameters()
    assert found.tokens == 320
    assert found.layout == Layout(2, 1, 2)
    assert found.pruned_share == (source - now) / (source - 15_000)
    assert found.total_bytes == sum(file.stat().st_size for file in step.iterdir())
    assert found.bytes_per_parameter == found.total_bytes / now
    content = json.loads(json.dumps(description_dict(found, 2)))
    assert content["shape"] == {"hidden_size": 29, "ffn_hidden_size": 42, "num_attention_heads": 5}
    assert content["shape_source"] == {"hidden_size": 30, "ffn_hidden_size": 44, "num_attention_heads": 6}
    assert (content["parameters"], content["parameters_source"], content["parameters_target"]) == (now, source, 15_000)
    assert content["removed"] == {"stem": 1, "ffn": 2, "attention": 1}
    assert [event["event"] for event in content["last_events"]] == [3, 4]
    assert (content["step"], content["skipped_steps"], content["samples"]) == (8, 1, 32)


@pytest.mark.parametrize(
    ("prune", "progress", "stage"),
    [
        ({}, {}, "pruning"),
        ({}, {"continue_from": 6}, "continuing since step 6"),
        ({}, {"events": 0}, "before the first removal"),
        ({"target_params": None}, {}, "training without pruning"),
    ],
)
def test_stages(
    tmp_path: Path, hold_states: HoldStates, prune: dict[str, Any], progress: dict[str, Any], stage: str
) -> None:
    saved = hold_states()
    saved.manifest.settings["prune"].update(prune)
    for name, value in progress.items():
        object.__setattr__(saved.manifest.progress, name, value)
    del saved.events[saved.manifest.progress.events :]
    found = describe(reshard(saved, tmp_path, Layout(), 1))
    assert found.stage == stage
    assert stage in format_description(found, 0)


def test_a_target_shape_is_counted(tmp_path: Path, hold_states: HoldStates) -> None:
    saved = hold_states()
    saved.manifest.settings["prune"].update(target_params=None, target_shape="hidden=24,heads=3")
    found = describe(reshard(saved, tmp_path, Layout(), 1))
    assert found.target is not None
    assert found.target.shape == (24, 44, 3)
    assert found.target.parameters is not None
    assert found.target.parameters < found.now.num_parameters()


@pytest.mark.parametrize("value", ["many", [1]])
def test_a_target_that_makes_no_sense_is_a_user_error(tmp_path: Path, hold_states: HoldStates, value: object) -> None:
    saved = hold_states()
    saved.manifest.settings["prune"]["target_params"] = value
    with pytest.raises(UserError, match="count"):
        describe(reshard(saved, tmp_path, Layout(), 1))


@pytest.mark.parametrize(
    ("topic", "name", "value"),
    [
        ("prune", "target_shape", "heads=7"),
        ("prune", "target_shape", "heads=1" + 5000 * "0"),
        ("prune", "target_params", "1" + 4400 * "0" + "T"),
        ("parallel", "pipeline_model_parallel_size", "abc"),
        ("parallel", "pipeline_model_parallel_size", 10**30),
        ("data", "seq_length", None),
        ("data", "seq_length", True),
    ],
)
def test_settings_that_make_no_sense_are_user_errors(
    tmp_path: Path, hold_states: HoldStates, topic: str, name: str, value: object
) -> None:
    saved = hold_states(layers=1)
    path = reshard(saved, tmp_path, Layout(), 1)
    content = json.loads((path / "manifest.json").read_text())
    content["settings"][topic][name] = value
    sign(path, content)
    with pytest.raises(UserError, match=r"^[^\n]*$"):
        format_description(describe(path), 0)
    assert [state for _, state, _ in run_steps(tmp_path, verify=False)] == ["complete"], "resuming could use it"


def test_the_text_lists_the_last_removals(step: Path) -> None:
    found = describe(step)
    lines = format_description(found, 3).splitlines()
    assert [line.split()[2] for line in lines[-3:]] == ["ffn", "ffn", "attention"]
    assert "removals" not in format_description(found, 0)
    assert len(format_description(found, 100).splitlines()) == len(lines) + 1


def test_nothing_is_wrong_with_a_whole_checkpoint(step: Path) -> None:
    assert list(damages(step)) == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, Path.unlink], ids=["flipped", "missing"])
def test_damage_is_named(step: Path, name: str, damage: Callable[[Path], object]) -> None:
    damage(step / name)
    found = list(damages(step))
    assert [error.file for error in found] == [name]


def test_every_damaged_file_is_named(step: Path) -> None:
    for name in FILES[2:]:
        flip(step / name)
    assert [error.file for error in damages(step)] == FILES[2:]


def test_steps_of_a_run(tmp_path: Path, step: Path, hold_states: HoldStates) -> None:
    steps = step.parent
    for number in (9, 10, 11):
        other = reshard(hold_states(adam_steps=number - 1), tmp_path / str(number), Layout(), 1)
        other.rename(steps / other.name)
    flip(steps / "step_00000009/manifest.json")
    flip(steps / "step_00000010/rank_00000.safetensors")
    (steps / "step_00000011/COMPLETE").unlink()
    (steps / ".writing_step_00000012").mkdir()
    expected = {
        "step_00000008": "complete",
        "step_00000009": "damaged",
        "step_00000010": "complete",
        "step_00000011": "unfinished",
        ".writing_step_00000012": "unfinished",
    }
    assert {name: state for name, state, _ in run_steps(tmp_path, verify=False)} == expected
    verified = list(run_steps(tmp_path, verify=True))
    assert {name: state for name, state, _ in verified} == expected | {"step_00000010": "damaged"}
    assert "rank_00000.safetensors" in verified[2][2]
    assert find_step(tmp_path).name == "step_00000010"


def _copied_as_another_step(step: Path) -> str:
    step.rename(step.with_name("step_00000009"))
    return "manifest.json is of step 8"


def _ledger_of_bytes(step: Path) -> str:
    (step / "ledger.jsonl").write_bytes(b"\xff\n")
    content = json.loads((step / "manifest.json").read_text())
    sign(step, content | {"ledger": sha256_file(step / "ledger.jsonl")})
    return "ledger.jsonl is no ledger"


def _another_count(step: Path) -> str:
    content = json.loads((step / "manifest.json").read_text())
    content["progress"]["events"] = 3
    sign(step, content)
    return "manifest.json counts 3 removals"


@pytest.mark.parametrize("change", [_copied_as_another_step, _ledger_of_bytes, _another_count])
@pytest.mark.parametrize("verify", [False, True])
def test_what_resuming_refuses_is_damaged_and_hides_no_other_step(
    tmp_path: Path, step: Path, hold_states: HoldStates, change: Callable[[Path], str], verify: bool
) -> None:
    why = change(step)
    other = reshard(hold_states(layers=1, adam_steps=19), tmp_path / "other", Layout(), 1)
    other.rename(step.parent / other.name)
    (_, first, reason), (_, second, _) = run_steps(tmp_path, verify)
    assert (first, second) == ("damaged", "complete")
    assert why in reason
    damaged = next(path for path in step.parent.iterdir() if path.name != other.name)
    assert [why in str(error) for error in damages(damaged)] == [True]


def test_a_path_without_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        find_step(tmp_path)
