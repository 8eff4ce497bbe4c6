"""What the loop does around its steps: files that cannot be written, a state taken up again, a stop that came late."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prune.checkpoint.manifest import Progress
from megatron_prune.config.schema import Config, GuardConfig, PruneConfig, TrainConfig
from megatron_prune.pruning.groups import MiniGroup
from megatron_prune.pruning.ledger import Ledger, parse_ledger
from megatron_prune.training.batches import Batches
from megatron_prune.training.engine import StepResult
from megatron_prune.training.loop import Trainer
from megatron_prune.training.signals import StopRequest


def make_trainer(config: Config, **parts: Any) -> Trainer:
    given = {"engine": None, "pruner": None, "batches": None, "ledger": Ledger(None), "progress": Progress(), **parts}
    mesh: Any = SimpleNamespace(world_size=1)
    return Trainer(config, mesh=mesh, callbacks=[], **given)


def test_a_full_disk_costs_no_line_of_the_ledger_for_good(
    tmp_path: Path, hold_states: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ledger.jsonl"
    engine = SimpleNamespace(partition=hold_states().manifest.partition)
    trainer = make_trainer(Config(), engine=engine, ledger=Ledger(path))
    decision: Any = SimpleNamespace(group=MiniGroup("stem", 1), scores={"stem": 0.5})

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer._record(decision)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        trainer._record(decision)
        trainer._record(decision)
    assert len(parse_ledger(path.read_bytes())) == 1
    assert capsys.readouterr().err.count("the ledger cannot be written (No space left on device)") == 1
    trainer._record(decision)
    assert parse_ledger(path.read_bytes()) == trainer.ledger.events
    assert [event.event for event in trainer.ledger.events] == [1, 2, 3, 4]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        trainer._record(decision)
    trainer._finish()
    assert parse_ledger(path.read_bytes()) == trainer.ledger.events


@pytest.mark.parametrize("pace", ["1:9", "2:1"])
def test_going_back_under_another_target_and_pace(hold_states: Any, pace: str) -> None:
    """The second stage of the earlier target is not taken up, and units are counted from where the pace changed."""
    saved = hold_states().manifest
    saved = dataclasses.replace(saved, progress=dataclasses.replace(saved.progress, continue_from=5))
    paces: list[tuple[int, int]] = []
    remembered: list[str] = []
    pruner = SimpleNamespace(
        met_by=lambda arch: False, pace_from=lambda *pace: paces.append(pace), remember=remembered.append
    )
    calls: list[Any] = []
    engine = SimpleNamespace(restart=lambda *_: calls.append("restart"), set_batch=lambda *size: calls.append(size))
    config = Config(prune=PruneConfig(prune_ratio=pace, prune_start_iter=0), train=TrainConfig(micro_batch_size=2))
    copies: Any = SimpleNamespace(dp_size=2)
    unread: Any = None
    batches = Batches(unread, unread, 4, 16, copies)
    progress = Progress(consumed_samples=99)
    trainer = make_trainer(config, engine=engine, pruner=pruner, batches=batches, progress=progress)
    trainer.go_back(saved.partition, None, saved)  # type: ignore[arg-type]
    assert trainer.pruning
    step, spent = saved.progress.step, saved.progress.units_spent
    assert (trainer.progress.pace_from, trainer.progress.pace_spent) == (step, spent)
    assert paces == [(step, spent)]
    assert remembered == [saved.progress.saliency]
    assert calls == [(2, 4), "restart"], "an engine is started with the batch that it will see"
    assert (trainer.progress.consumed_samples, trainer.progress.rollbacks) == (99, 1)


@pytest.mark.parametrize("applied", [True, False])
def test_a_skipped_step_s_loss_is_no_jump(applied: bool, hold_states: Callable[..., Any]) -> None:
    states = hold_states()
    ledger = Ledger(None)
    ledger.events = states.events
    engine = SimpleNamespace(
        partition=states.manifest.partition, train_step=lambda *_: StepResult(float("nan"), 1.0, applied)
    )
    batches = SimpleNamespace(training=lambda start: iter(()))
    config = Config(guard=GuardConfig(rollback_loss_jump=1.0), train=TrainConfig(train_iters=9))
    progress = Progress(step=5, recent_losses=(2.0,) * 20)
    record = make_trainer(config, engine=engine, batches=batches, ledger=ledger, progress=progress)._step()
    assert record.jumped == applied


def test_the_stop_file_does_not_outlive_a_run_that_ends(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    make_trainer(Config(train=TrainConfig(train_iters=0))).run(StopRequest(None, tmp_path / "stop"))
    assert not (tmp_path / "stop").exists()
