"""What the page knows of a run, from directories that are whole, half-written, damaged or no run at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prune.errors import UserError
from megatron_prune.report_page.page import page
from megatron_prune.report_page.records import read_run
from megatron_prune.report_page.state import RECENT_SECONDS
from megatron_prune.report_page.summary import seconds_left, target_share
from megatron_prune.training.run_dir import locked

MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, make_run: MakeRun) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="module")
def half_way(tmp_path_factory: pytest.TempPathFactory, make_run: MakeRun) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "half", upto=160)


@pytest.fixture
def run_dir(half_way: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(half_way, tmp_path / "run"))


def test_everything_is_read(finished: Path) -> None:
    run = read_run(finished)
    assert not run.notes
    assert run.last_step == 400
    assert run.last_tokens == 400 * 512
    assert run.num_layers == 12
    assert (run.source_width("attention"), run.source_width("ffn"), run.source_width("stem")) == (12, 256, 96)
    assert run.target_parameters == 800_000
    assert run.parameters == run.events[-1].parameters <= 800_000
    assert target_share(run) == 1.0
    assert [line["step"] for line in run.validation] == list(range(50, 401, 50))
    assert run.checkpoints == ("step_00000400",)


def test_exports_written_and_to_come(half_way: Path) -> None:
    exports = {export.name: export for export in read_run(half_way).exports}
    assert [name for name, export in exports.items() if export.written] == ["1.3M", "1.1M"]
    assert exports["850K"].crossed is None
    events = read_run(half_way).events
    crossed = exports["1.1M"].crossed
    assert crossed is not None
    assert crossed.parameters <= 1_100_000 < events[crossed.event - 2].parameters


def test_the_export_of_the_target_is_that_of_the_last_removal(run_dir: Path) -> None:
    (run_dir / "exports" / "target").mkdir()
    (run_dir / "exports" / "target" / "config.json").write_text("{}")
    run = read_run(run_dir)
    (target,) = (export for export in run.exports if export.name == "target")
    assert target.crossed == run.events[-1]


def test_an_int8_copy_beside_a_snapshot_is_no_export(half_way: Path) -> None:
    names = [export.name for export in read_run(half_way).exports]
    (half_way / "exports" / "1.1M-int8").mkdir()
    (half_way / "exports" / "1.1M.onnx").touch()
    assert [export.name for export in read_run(half_way).exports] == names


class TestState:
    def test_all_steps_done(self, finished: Path) -> None:
        assert read_run(finished).state.name == "finished"

    def test_a_process_has_the_lock(self, run_dir: Path) -> None:
        with locked(run_dir):
            run = read_run(run_dir)
            assert run.state.name == "running"
            assert f"pid {os.getpid()}" in run.state.why
            # 240 steps of 512 tokens, at the median of the last five lines
            assert seconds_left(run) == pytest.approx(240 * 512 / (9e3 + 20 * 156))
        run = read_run(run_dir)
        assert run.state.name == "stopped"
        assert "step 160" in run.state.why
        assert seconds_left(run) is None

    def test_a_last_step_whose_checkpoint_is_being_written_is_running(self, finished: Path) -> None:
        with locked(finished):
            assert read_run(finished).state.name == "running"

    def test_another_machine_s_run_goes_by_its_files(self, run_dir: Path) -> None:
        (run_dir / ".lock").write_text("node17, pid 4")
        assert read_run(run_dir).state.name == "running"
        old = time.time() - RECENT_SECONDS - 60
        os.utime(run_dir / "metrics.jsonl", (old, old))
        assert read_run(run_dir).state.name == "stopped"


_HUGE = b'{"step": 1, "loss": 2.0, "tokens": 1' + 400 * b"0" + b"}"


class TestDamage:
    def test_torn_last_lines_are_not_worth_a_note(self, run_dir: Path) -> None:
        whole = read_run(run_dir)
        for name in ("metrics.jsonl", "ledger.jsonl"):
            with (run_dir / name).open("a") as file:
                file.write('{"step": 161, "tok')
        assert read_run(run_dir) == whole

    @pytest.mark.parametrize(
        "line",
        [
            b"\0\0\0\0",
            b"[1]",
            b'{"step": "x", "loss": 1}',
            b'{"step": 3, "loss": 1}',
            b"\xff\xfe",
            b"[" * 100_000,
            _HUGE,
        ],
    )
    def test_a_damaged_line_is_left_out_and_told(self, run_dir: Path, line: bytes) -> None:
        path = run_dir / "metrics.jsonl"
        path.write_bytes(line + b"\n" + path.read_bytes())
        run = read_run(run_dir)
        assert run.notes == ("1 damaged line is left out of metrics.jsonl",)
        assert len(run.training) == 80

    def test_so_in_the_ledger(self, run_dir: Path) -> None:
        path = run_dir / "ledger.jsonl"
        lines = path.read_text().splitlines()
        lines[3:5] = [lines[3].replace('"ffn"', '"fnn"', 1)[:90], "{}"]
        path.write_text("\n".join(lines) + "\n")
        run = read_run(run_dir)
        assert run.notes == ("2 damaged lines are left out of ledger.jsonl",)
        assert len(run.events) == len(lines) - 2

    def test_a_value_of_another_type_is_a_gap(self, run_dir: Path) -> None:
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write('{"step": 162, "tokens": 82944, "loss": null, "tokens_per_second": "fast", "lr": true}\n')
            file.write(f'{{"step": 162, "tokens": 82944, "loss": 1{400 * "0"}, "grad_norm": NaN, "parameters": []}}\n')
        run = read_run(run_dir)
        assert not re.search(r"\bNaN\b|Infinity", page(run).partition("<script")[2].partition("</script>")[0])
        assert run.last_step == 162
        assert not run.notes

    def test_without_config_and_source_less_is_known(self, run_dir: Path) -> None:
        (run_dir / "config.yaml").write_text("train_iters: many\n")
        shutil.rmtree(run_dir / "source")
        run = read_run(run_dir)
        assert run.config is None
        assert run.source is None
        assert len(run.notes) == 2
        assert run.target_parameters is None
        assert run.num_layers == 12
        assert (run.source_width("attention"), run.source_width("ffn"), run.source_width("stem")) == (12, 256, 96)


def test_a_run_that_has_just_begun(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "ledger.jsonl").write_text("")
    run = read_run(run_dir)
    assert (run.last_step, run.last_tokens, run.training, run.events) == (0, 0, (), ())
    assert run.parameters == run.source_parameters == 1_427_808


def test_a_target_shape_has_parameters(run_dir: Path) -> None:
    text = (run_dir / "config.yaml").read_text()
    text = text.replace("target_params: 800K", "target_params: null")
    text = text.replace("target_shape: null", "target_shape: hidden=90,ffn=164,heads=5")
    (run_dir / "config.yaml").write_text(text)
    assert read_run(run_dir).target_parameters == 798_570


def test_validation_lines_without_tokens_get_them(run_dir: Path) -> None:
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if "val_loss" in line:
            del line["tokens"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line["tokens"] for line in read_run(run_dir).validation] == [50 * 512, 100 * 512, 150 * 512]


def test_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither config.yaml nor metrics.jsonl") as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is no directory"):
        read_run(tmp_path / "none")
