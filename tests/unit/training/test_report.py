"""The reporter: the line, the file, resuming, and sinks that fail."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import resource
import signal
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.config.schema import Config, RunConfig
from megatron_prune.errors import UserError
from megatron_prune.training.console import Status, format_count, format_line
from megatron_prune.training.report import Reporter, read_jsonl

RECORD = {
    "step": 120,
    "tokens": 983040,
    "loss": 2.3451,
    "grad_norm": 0.913,
    "lr": 3e-4,
    "tokens_per_second": 12345.6,
    "mfu": 0.4123,
    "parameters": 457_100_000,
    "hidden_size": 1195,
    "ffn_hidden_size": 3006,
    "num_attention_heads": 19,
    "scores": {"attention": 2.1e-7, "ffn": 3.4e-7, "stem": 5e-7},
    "skipped": 0,
}
STATUS = Status(source_parameters=1_711_000_000, target_parameters=457_000_000, eta_seconds=11520)


def with_sinks(**settings: Any) -> Config:
    return dataclasses.replace(Config(), run=RunConfig(**settings))


def report_steps(directory: Path, steps: range, resumed_at: int | None = None) -> None:
    with Reporter(directory, Config(), is_main=True, total_steps=10) as reporter:
        if resumed_at is not None:
            reporter.truncate_after(resumed_at)
        for step in steps:
            reporter.log({"step": step, "loss": 1.0 / step})


class TestLine:
    def test_everything(self) -> None:
        assert format_line(RECORD, STATUS, 5000) == (
            "step 120/5000 | loss 2.345 | grad 0.91 | lr 3.0e-4 | 12.3k tok/s | MFU 41.2% | d 1195 ff 3006 h 19"
            " | 457.1M (target 457M, 100%) | next attention 2.1e-7 | ETA 3h12m"
        )

    def test_what_is_missing_is_left_out(self) -> None:
        assert format_line({"step": 3}, Status(), None) == "step 3"
        assert format_line({"step": 3, "loss": 2.0, "mfu": None}, Status(), 9) == "step 3/9 | loss 2.000"

    def test_validation(self) -> None:
        assert format_line({"step": 3, "val_loss": 2.5}, Status(), 9) == "step 3/9 | val loss 2.500"

    def test_progress_is_the_share_of_what_must_go(self) -> None:
        status = Status(source_parameters=2000, target_parameters=1000)
        assert "1.2k (target 1k, 75%)" in format_line({"step": 1, "parameters": 1250}, status, 9)

    def test_next_type_can_be_told(self) -> None:
        status = Status(next_type="stem", removed={"ffn": 3})
        line = format_line({"step": 1, "scores": RECORD["scores"], "skipped": 2}, status, None)
        assert line == "step 1 | removed 3 ffn | next stem 5.0e-7 | 2 skipped"

    def test_nan_is_shown(self) -> None:
        assert "loss nan" in format_line({"step": 1, "loss": math.nan}, Status(), None)

    @pytest.mark.parametrize(
        ("count", "text"),
        [
            (7, "7"),
            (999, "999"),
            (12345, "12.3k"),
            (457e6, "457M"),
            (457.1e6, "457.1M"),
            (1.711e9, "1.71B"),
            (2e9, "2B"),
            (100e6, "100M"),
            (0, "0"),
        ],
    )
    def test_counts(self, count: float, text: str) -> None:
        assert format_count(count) == text


class TestFile:
    def test_lines_are_the_records(self, tmp_path: Path) -> None:
        reporter = Reporter(tmp_path / "new" / "run", Config(), is_main=True, total_steps=None)
        reporter.log(RECORD, STATUS)
        # Before close: a run that is killed loses nothing.
        assert json.loads((tmp_path / "new" / "run" / "metrics.jsonl").read_text()) == RECORD
        reporter.close()
        reporter.close()

    def test_nan_infinity_and_tensors_become_json(self, tmp_path: Path) -> None:
        with Reporter(tmp_path, Config(), is_main=True, total_steps=None) as reporter:
            reporter.log(
                {
                    "step": 1,
                    "loss": math.nan,
                    "grad_norm": torch.tensor(math.inf),
                    "tokens": torch.tensor(5),
                    "scores": {"ffn": -math.inf},
                }
            )
        text = (tmp_path / "metrics.jsonl").read_text()
        parsed = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert parsed == {"step": 1, "loss": None, "grad_norm": None, "tokens": 5, "scores": {"ffn": None}}

    def test_resumed_equals_uninterrupted(self, tmp_path: Path) -> None:
        report_steps(tmp_path / "whole", range(1, 11))
        report_steps(tmp_path / "resumed", range(1, 8))
        with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 8, "lo')  # killed in the middle of a line
        report_steps(tmp_path / "resumed", range(6, 11), resumed_at=5)
        texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "resumed")]
        assert texts[0] == texts[1]
        assert [path.name for path in (tmp_path / "resumed").iterdir()] == ["metrics.jsonl"]

    def test_only_lines_without_a_step_are_dropped(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "metrics.jsonl"
        bad = ['{"loss": 1}', "3", '{"step": "2"}', '{"step": true}', "[" * 3000, "{", '{"step": 1.5}']
        good = ['{"step": 1, "loss": 2.50}', '{"step": 2}']
        path.write_text("\n".join([good[0], *bad, good[1], '{"step": 3}', '{"st']))
        with Reporter(tmp_path, Config(), is_main=True, total_steps=10) as reporter:
            reporter.truncate_after(2)
        assert path.read_text().splitlines() == good
        warnings = capsys.readouterr().err.splitlines()
        assert [line.split(" is dropped")[0] for line in warnings] == [f"warning: {path}:{n}" for n in range(2, 9)]

    def test_a_full_disk_costs_lines_and_says_so_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Nor does half a line stay."""
        path = tmp_path / "metrics.jsonl"
        report_steps(tmp_path, range(1, 2))
        size = path.stat().st_size
        with Reporter(tmp_path, Config(), is_main=True, total_steps=10) as reporter:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, hard))
            try:
                reporter.log({"step": 2})
                reporter.log({"step": 3})
                reporter.rewind(1)
                assert path.stat().st_size == size
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
                signal.signal(signal.SIGXFSZ, ignored)
            reporter.log({"step": 4})
        assert [record["step"] for record in read_jsonl(path)] == [1, 4]
        assert capsys.readouterr().err.count("metrics.jsonl cannot be written") == 1

    def test_starting_anew_empties_the_file(self, tmp_path: Path) -> None:
        report_steps(tmp_path, range(1, 4))
        report_steps(tmp_path, range(1, 3), resumed_at=0)
        assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]

    def test_damage_before_the_last_line_is_not_hidden(self, tmp_path: Path) -> None:
        path = tmp_path / "lines"
        path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
        with pytest.raises(UserError, match="lines:2"):
            read_jsonl(path)


class TestConsole:
    def test_other_ranks_are_silent(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = with_sinks(tensorboard=True, wandb_project="p")
        with Reporter(tmp_path / "run", config, is_main=False, total_steps=5) as reporter:
            reporter.truncate_after(0)
            reporter.log(RECORD)
            reporter.event({"event": "export", "step": 1})
        assert capsys.readouterr() == ("", "")
        assert not (tmp_path / "run").exists()

    def test_without_a_terminal_lines_go_to_stdout(self, capsys: pytest.CaptureFixture[str]) -> None:
        with Reporter(None, Config(), is_main=True, total_steps=5) as reporter:
            reporter.log({"step": 1, "loss": 2.0})
        assert capsys.readouterr() == ("step 1/5 | loss 2.000\n", "")

    def test_removals_are_summed_into_the_next_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        with Reporter(None, Config(), is_main=True, total_steps=None) as reporter:
            for kind in ("ffn", "ffn", "stem"):
                reporter.event({"event": "removal", "step": 1, "type": kind})
            reporter.log({"step": 2})
            reporter.log({"step": 3})
        assert capsys.readouterr().out.splitlines() == ["step 2 | removed 2 ffn, 1 stem", "step 3"]

    def test_other_events_are_lines(self, capsys: pytest.CaptureFixture[str]) -> None:
        with Reporter(None, Config(), is_main=True, total_steps=9) as reporter:
            reporter.event({"event": "export", "step": 4, "parameters": 800_000_000, "path": "exports/800M"})
        assert capsys.readouterr().out == "step 4/9 | export | 800M | path exports/800M\n"

    def test_on_a_terminal_there_is_a_bar(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        with Reporter(None, Config(), is_main=True, total_steps=10) as reporter:
            reporter.truncate_after(4)
            reporter.log({"step": 6})
            reporter.log({"step": 9})
            shown = terminal.getvalue()
        assert "9/10" in shown
        assert capsys.readouterr().out.splitlines() == ["step 6/10", "step 9/10"]


class TestSinks:
    def test_tensorboard_has_the_numbers(self, tmp_path: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        with Reporter(tmp_path, with_sinks(tensorboard=True), is_main=True, total_steps=None) as reporter:
            reporter.log({"step": 7, "loss": 2.5, "grad_norm": math.nan, "scores": {"ffn": 0.5}})
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert sorted(events.Tags()["scalars"]) == ["loss", "scores/ffn"]
        assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 2.5)]

    def test_wandb_works_offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        with Reporter(tmp_path, with_sinks(wandb_project="tests"), is_main=True, total_steps=None) as reporter:
            reporter.log({"step": 1, "loss": 2.5})
        assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))

    def test_wandb_resumes_the_same_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        started: list[dict[str, Any]] = []
        logged: list[tuple[int, dict[str, float]]] = []

        class FakeRun:
            def log(self, values: dict[str, float], step: int) -> None:
                logged.append((step, values))

            def finish(self) -> None:
                logged.append((-1, {}))

        def init(**settings: Any) -> FakeRun:
            started.append(settings)
            return FakeRun()

        wandb = types.ModuleType("wandb")
        monkeypatch.setattr(wandb, "init", init, raising=False)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        for step in (1, 2):
            with Reporter(tmp_path, with_sinks(wandb_project="p"), is_main=True, total_steps=None) as reporter:
                reporter.log({"step": step, "loss": 0.5})
        assert len(started) == 2
        assert [(run["resume"], run["project"]) for run in started] == [("allow", "p")] * 2
        assert started[0]["id"] == started[1]["id"] != ""
        assert started[0]["config"]["run"]["wandb_project"] == "p"
        assert logged == [(1, {"loss": 0.5}), (-1, {}), (2, {"loss": 0.5}), (-1, {})]

    def test_a_missing_package_warns_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "wandb", None)
        with Reporter(tmp_path, with_sinks(wandb_project="p"), is_main=True, total_steps=None) as reporter:
            reporter.log({"step": 1})
            reporter.log({"step": 2})
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert "warning: wandb is off for this run" in captured.err
        assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2

    def test_a_failing_sink_is_dropped_and_the_others_stay(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        written: list[int] = []

        class Failing:
            def __init__(self, *_: object) -> None:
                self.calls = 0

            def write(self, step: int, values: Mapping[str, float]) -> None:
                raise OSError("disk full\nand more")

            def close(self) -> None:
                pytest.fail("a dropped sink is left alone")

        class Working(Failing):
            def write(self, step: int, values: Mapping[str, float]) -> None:
                written.append(step)

            def close(self) -> None:
                written.append(-1)

        monkeypatch.setattr("megatron_prune.training.report.WandbSink", Failing)
        monkeypatch.setattr("megatron_prune.training.report.TensorBoardSink", Working)
        config = with_sinks(wandb_project="p", tensorboard=True)
        with Reporter(tmp_path, config, is_main=True, total_steps=None) as reporter:
            for step in (1, 2, 3):
                reporter.log({"step": step})
        assert capsys.readouterr().err == "warning: Failing stopped and is dropped: OSError: disk full\n"
        assert written == [1, 2, 3, -1]
