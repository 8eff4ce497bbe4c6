"""When a run saves, and what a checkpoint that cannot be written does to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError

from megatron_prune.checkpoint.manifest import Progress
from megatron_prune.checkpoint.store import SaveError
from megatron_prune.config.schema import Config, PruneConfig, RunConfig
from megatron_prune.training import callbacks
from megatron_prune.training.callbacks import Checkpoints, Exports
from megatron_prune.training.resume import resumed
from megatron_prune.training.speed import Throughput


class Disk:
    """Stands in for both ways to save; writes down what was asked of it, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.full = False
        self.done = False
        self.deleting: Any = None

    def save(self, run_dir: Path, manifest: Any, *others: Any) -> Path:
        return self._write("saved", manifest.progress.step)

    def begin(self, run_dir: Path, manifest: Any, *others: Any) -> Any:
        step = manifest.progress.step
        self.log.append(f"began {step}")
        finish = lambda: self._write("finished", step)  # noqa: E731
        return SimpleNamespace(
            progress=manifest.progress, written=lambda: self.done, finish=finish, deleting=self.deleting
        )

    def _write(self, what: str, step: int) -> Path:
        if self.full:
            self.log.append(f"failed {step}")
            raise SaveError("no room")
        self.log.append(f"{what} {step}")
        return Path(f"step_{step:08d}")


class Run:
    """A trainer's face, as far as the callback looks at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, saved: Progress | None = None, **flags: Any) -> None:
        self.disk, self.events = Disk(), list[dict[str, Any]]()
        monkeypatch.setattr(callbacks, "save_checkpoint", self.disk.save)
        monkeypatch.setattr(callbacks, "BackgroundSave", self.disk.begin)
        reporter: Any = SimpleNamespace(event=self.events.append)
        self.callback = Checkpoints(reporter, Throughput(1, 1, None), Path("run"), saved)
        self.trainer: Any = SimpleNamespace(
            config=Config(run=RunConfig(**flags)),
            progress=Progress(),
            engine=SimpleNamespace(partition=None, state_fragments=lambda: iter(())),
            batches=SimpleNamespace(train=SimpleNamespace(fingerprint=lambda: "data")),
            ledger=SimpleNamespace(events=[]),
            mesh=None,
        )

    def step(self, count: int = 1, jumped: bool = False) -> None:
        record: Any = SimpleNamespace(jumped=jumped, result=SimpleNamespace(loss=9.0))
        for _ in range(count):
            step = self.trainer.progress.step + 1
            self.trainer.progress = dataclasses.replace(self.trainer.progress, step=step)
            self.callback.after_step(self.trainer, record)

    def end(self) -> list[str]:
        self.callback.at_end(self.trainer)
        return self.disk.log


def test_saves_at_intervals_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, save_interval=2)
    run.step(5)
    assert run.end() == ["saved 2", "saved 4", "saved 5"]


@pytest.mark.parametrize(("exported", "log"), [((), []), (("1B",), ["saved 0"])])
def test_what_is_saved_already_is_not_saved_again(
    monkeypatch: pytest.MonkeyPatch, exported: tuple[str, ...], log: list[str]
) -> None:
    """A resumed run that stops at once has nothing new to save, unless it has exported in the meantime."""
    run = Run(monkeypatch, Progress())
    run.trainer.progress = Progress(exported=exported)
    assert run.end() == log


def test_one_at_a_time_behind_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, save_interval=2, async_save=True)
    run.step(3)
    assert run.disk.log == ["began 2"]
    run.step(1)
    assert run.disk.log == ["began 2", "finished 2", "began 4"], "the second waits for the first"
    run.disk.done = True
    run.step(1)
    assert run.disk.log[3:] == ["finished 4"]
    assert run.end()[4:] == ["saved 5"], "the last one in the foreground"
    assert [event["to"] for event in run.events] == ["step_00000002", "step_00000004", "step_00000005"]


def test_the_end_waits_for_the_one_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, save_interval=2, async_save=True)
    run.step(2)
    assert run.end() == ["began 2", "finished 2"]
    later = Run(monkeypatch, save_interval=2, async_save=True)
    later.step(3)
    assert later.end() == ["began 2", "finished 2", "saved 3"]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_is_reported_and_tried_again(monkeypatch: pytest.MonkeyPatch, async_save: bool) -> None:
    run = Run(monkeypatch, save_interval=2, async_save=async_save)
    run.disk.full = run.disk.done = True
    run.step(3)
    assert [(event["event"], event["why"]) for event in run.events] == [("no checkpoint", "no room")]
    run.disk.full = False
    run.step(1 + async_save)
    assert run.disk.log[-1] == ("finished 4" if async_save else "saved 4")


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_stops_a_run_that_wants_it(monkeypatch: pytest.MonkeyPatch, async_save: bool) -> None:
    run = Run(monkeypatch, save_interval=2, async_save=async_save, on_save_failure="stop")
    run.disk.full = run.disk.done = True
    run.step(1)
    with pytest.raises(SaveError):
        run.step(2)


@pytest.mark.parametrize("async_save", [False, True])
def test_a_run_cannot_end_well_on_a_full_disk(monkeypatch: pytest.MonkeyPatch, async_save: bool) -> None:
    """Not with 0, nor with 75: a requeued job would go back further than it was told."""
    run = Run(monkeypatch, save_interval=2, async_save=async_save)
    run.disk.full = True
    run.step(2)
    with pytest.raises(SaveError):
        run.end()


def test_what_failed_behind_the_steps_is_made_up_for_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, save_interval=2, async_save=True)
    run.step(2)
    original = run.disk._write

    def once_full(what: str, step: int) -> Path:
        run.disk.full = what == "finished"
        return original(what, step)

    monkeypatch.setattr(run.disk, "_write", once_full)
    assert run.end() == ["began 2", "failed 2", "saved 2"]


def test_the_end_waits_for_what_is_being_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, save_interval=2, async_save=True)
    run.disk.deleting = SimpleNamespace(join=lambda: run.disk.log.append("deleted"))
    run.step(2)
    assert run.end() == ["began 2", "finished 2", "deleted"]


def test_a_jump_without_a_checkpoint_to_go_back_to_skips_none(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, save_interval=2)
    monkeypatch.setattr(callbacks, "newest_whole", lambda found, mesh: None)
    run.step(2, jumped=True)
    assert run.disk.log == ["saved 2"]
    assert [event["event"] for event in run.events] == ["the loss jumped", "the loss jumped", "checkpoint"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
def test_an_export_on_a_full_disk_is_reported(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(callbacks, "export_verified", full)
    trainer: Any = SimpleNamespace(config=Config(), architecture=None)
    any_reporter: Any = None
    event = Exports(any_reporter, Throughput(1, 1, None), Path("run"), {})._write(trainer, "1B", {})
    assert event["event"] == "export could not be written"
    assert "No space left" in event["why"]


def test_the_target_is_exported_once_pruning_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(Exports, "_export", lambda self, trainer, name: written.append(name))
    any_reporter: Any = None
    exports = Exports(any_reporter, Throughput(1, 1, None), Path("run"), {})
    trainer: Any = SimpleNamespace(
        config=Config(prune=PruneConfig(target_kv_bytes="4K", export_at=("target", "1K"))),
        progress=Progress(events=3),
        architecture=SimpleNamespace(num_parameters=lambda: 2000),
        removals_left=0,
        asked_to_stop=lambda: False,
    )

    def mark_exported(name: str) -> None:
        trainer.progress = dataclasses.replace(trainer.progress, exported=(*trainer.progress.exported, name))

    trainer.mark_exported = mark_exported
    any_record: Any = None
    exports.at_start(trainer)
    exports.after_removal(trainer, any_record)
    exports.after_step(trainer, any_record)
    assert written == []
    trainer.progress = dataclasses.replace(trainer.progress, continue_from=7)
    for _ in range(2):
        exports.after_step(trainer, any_record)
        exports.at_start(trainer)
    assert written == ["target"]


def test_a_target_that_is_lowered_is_exported_again() -> None:
    saved: Any = SimpleNamespace(
        progress=Progress(step=9, continue_from=7, exported=("1B", "target")),
        setting=lambda topic, name: getattr(getattr(Config(), topic), name),
        settings={"prune": dataclasses.asdict(PruneConfig())},
    )
    assert resumed(Config(), saved, met=True).exported == ("1B", "target")
    assert resumed(Config(), saved, met=False).exported == ("1B",)
