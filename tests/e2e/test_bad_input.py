"""Every mistake gives one clear line and exit code 2, before anything is written."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ports import free_port
from safetensors.torch import load_file, save_file

from megatron_prune import pretrain
from megatron_prune.checkpoint.hf import read_architecture
from megatron_prune.config import load_config
from megatron_prune.data.indexed import IndexedDatasetWriter
from megatron_prune.parallel.join import joined
from megatron_prune.pretrain import QUIET_SECONDS, main
from megatron_prune.training.latency import measured_table, write_table


@pytest.fixture
def fails(workspace: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    """Start a run in this process with some flags changed; expects exit code 2 and returns the one line."""

    def start(*extra: str, **changes: Any) -> str:
        save = tmp_path / "run"
        code = main([*workspace.flags("unused", **{"save": save, **changes}), *extra])
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert code == 2
        assert len(errors) == 1, errors
        assert not save.exists(), "nothing may be written"
        return errors[0]

    return start


@pytest.fixture
def copied_source(workspace: Any, tmp_path: Path) -> Path:
    """A source that a test may spoil."""
    return Path(shutil.copytree(workspace.source, tmp_path / "source"))


def edit_config(source: Path, **changes: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))


def test_missing_source(fails: Any) -> None:
    assert "/nowhere/model" in fails(source="/nowhere/model")


def test_unsupported_source(fails: Any, copied_source: Path) -> None:
    edit_config(copied_source, model_type="bert")
    assert "bert" in fails(source=copied_source)


def test_source_with_an_unknown_tensor(fails: Any, copied_source: Path) -> None:
    weights = load_file(copied_source / "model.safetensors")
    save_file({**weights, "model.extra.weight": torch.ones(2)}, copied_source / "model.safetensors")
    assert "model.extra.weight" in fails(source=copied_source)


def test_source_with_a_missing_tensor(fails: Any, copied_source: Path) -> None:
    weights = load_file(copied_source / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, copied_source / "model.safetensors")
    assert "model.norm.weight" in fails(source=copied_source)


def test_wrong_vocabulary_for_the_data(fails: Any, tmp_path: Path) -> None:
    with IndexedDatasetWriter(str(tmp_path / "big"), np.uint16) as writer:
        writer.add_document(np.full(2000, 5000))
        writer.finalize()
    line = fails(data_path=tmp_path / "big")
    assert "vocabulary" in line
    assert "5000" in line


def test_truncated_bin(fails: Any, workspace: Any, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{workspace.data}{suffix}", tmp_path / f"cut{suffix}")
    content = (tmp_path / "cut.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(content[:-10])
    assert "cut.bin" in fails(data_path=tmp_path / "cut")


def test_index_with_wrong_magic(fails: Any, workspace: Any, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{workspace.data}{suffix}", tmp_path / f"magic{suffix}")
    content = (tmp_path / "magic.idx").read_bytes()
    (tmp_path / "magic.idx").write_bytes(b"NOTMAGIC!" + content[9:])
    assert "magic.idx" in fails(data_path=tmp_path / "magic")


def test_missing_data(fails: Any) -> None:
    assert "/nowhere/data" in fails(data_path="/nowhere/data")


def test_target_above_the_source(fails: Any) -> None:
    assert "not below the source" in fails(target_shape=None, target_params="1B")


def test_target_below_the_floor(fails: Any) -> None:
    assert "below the floor" in fails(target_shape=None, target_params="1K")


def test_misspelt_yaml_key_names_the_nearest(fails: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("globl_batch_size: 8\n")
    line = fails("--config", str(tmp_path / "run.yaml"))
    assert "globl_batch_size" in line
    assert "did you mean global_batch_size" in line


def test_batch_sizes_that_do_not_divide(fails: Any) -> None:
    assert "no multiple" in fails(micro_batch_size=3)


def test_unknown_tokenizer(fails: Any) -> None:
    assert "/nowhere/tokenizer" in fails(tokenizer="/nowhere/tokenizer")


def test_load_without_a_checkpoint(fails: Any, tmp_path: Path) -> None:
    assert "no complete checkpoint" in fails(load=tmp_path)


def test_save_that_cannot_be_a_directory(workspace: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for save in (tmp_path / "file", tmp_path / "file" / "run"):
        assert main(workspace.flags("unused", save=save)) == 2
        assert f"{tmp_path / 'file'} is a file" in capfd.readouterr().err


def test_numbers_that_are_none(fails: Any, copied_source: Path) -> None:
    edit_config(copied_source, rms_norm_eps=float("nan"))
    assert "rms_norm_eps" in fails(source=copied_source)


def test_an_error_on_another_rank_is_said(
    workspace: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(workspace.flags("unused", source="/nowhere/model")) == 2
    assert "error: rank 1: source '/nowhere/model'" in capfd.readouterr().err


@pytest.mark.parametrize(
    "mistake", [["--lr", "-1"], ["--leraning-rate", "1"], ["--lr", "fast"], ["--config", "/nowhere.yaml"]], ids=str
)
def test_a_wrong_setting_is_said_once_per_node(
    workspace: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], mistake: list[str]
) -> None:
    """The others of the node keep quiet for long enough: a launcher ends all of them once the first has left."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for rank in range(2):
        for name, value in {"RANK": rank + 8, "WORLD_SIZE": 16, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))
        assert main([*workspace.flags("unused"), *mistake]) == 2
        error = capfd.readouterr().err
        assert (error.startswith("error: rank 8: ") and error.count("\n") == 1) if rank == 0 else not error
        assert waits == [QUIET_SECONDS] * rank


@pytest.mark.parametrize(
    ("rank", "code", "line"),
    [(0, 1, "rank(s) 1 of 2 never arrived at 127.0.0.1:"), (1, 2, "rank 1: no rank 0 at 127.0.0.1:")],
)
def test_a_rank_that_never_comes_is_not_waited_for(
    workspace: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], rank: int, code: int, line: str
) -> None:
    """It was lost, or made a mistake of its own, before there was a watch over it."""
    monkeypatch.setattr(pretrain, "joined", functools.partial(joined, 0.3))
    port = free_port()
    place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    handler = signal.getsignal(signal.SIGTERM)
    assert main(workspace.flags("unused")) == code
    assert signal.getsignal(signal.SIGTERM) == handler
    errors = [text for text in capfd.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {line}{port} within 0 s")


def test_a_launcher_ends_after_the_one_line(workspace: Any) -> None:
    done = workspace.run(["--no-such-flag"], processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: unknown flag --no-such-flag") == 1
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]


def test_all_configuration_errors_come_together(fails: Any) -> None:
    line = fails(lr=-1, keep_last=1, global_batch_size=5)
    assert "--lr" in line
    assert "--keep-last" in line
    assert "--global-batch-size" in line


def test_dry_run_prints_the_plan_and_writes_nothing(
    workspace: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*workspace.flags("unused", save=tmp_path / "run"), "--dry-run"]) == 0
    assert "target" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_damaged_checkpoint_is_named(workspace: Any, capfd: pytest.CaptureFixture[str]) -> None:
    flags = workspace.flags("damaged", target_shape=None, train_iters=4, eval_interval=0)
    workspace.run_ok(flags)
    (shard,) = (workspace.root / "damaged" / "checkpoints").glob("*/rank_00000.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(flags) == 2
    error = capfd.readouterr().err
    assert str(shard) in error
    assert "damaged" in error


@pytest.mark.parametrize("dry", [True, False])
def test_what_decides_is_read_before_processes_meet(
    workspace: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, dry: bool
) -> None:
    def nobody_joins() -> None:
        raise AssertionError("it came to a meeting")

    monkeypatch.setattr(pretrain, "joined", nobody_joins)
    run, dry_run = tmp_path / "run", ["--dry-run"] * dry
    flags = workspace.flags("unused", save=run, target_shape=None, replay=tmp_path / "ledger.jsonl")
    assert main([*flags, *dry_run]) == 2
    assert "ledger.jsonl is no ledger" in capfd.readouterr().err
    run.mkdir()
    (run / "latency.json").write_text("{")
    changes = {"prune_cost": "latency", "gqa_mode": "balanced"}
    assert main([*workspace.flags("unused", save=run, **changes), *dry_run]) == 2
    assert "latency.json is no latency table" in capfd.readouterr().err
    flags = workspace.flags("unused", save=run, target_shape=None, target_latency_ms=9.0, gqa_mode="balanced")
    config, source = load_config(flags), read_architecture(workspace.source)
    write_table(run, measured_table(config, source, lambda arch: arch.hidden_size / 10))
    assert main([*flags, *dry_run]) == 2
    assert "--target-latency-ms 9 is not between the 0.8 ms" in capfd.readouterr().err


def test_a_dry_run_looks_at_the_checkpoint(workspace: Any, capfd: pytest.CaptureFixture[str]) -> None:
    flags = workspace.flags("begun", target_shape=None, train_iters=3, eval_interval=0)
    workspace.run_ok(flags)
    few_shot = workspace.flags("begun", few_shot_samples=4, eval_interval=0)
    assert main([*few_shot, "--dry-run"]) == 2
    assert "--few-shot-samples 4 cannot go on from the checkpoint of step 3" in capfd.readouterr().err
