"""tools/plot_run.py on synthetic run directories."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from matplotlib.image import imread

from megatron_prune.plotting import read_run, source_widths
from megatron_prune.training.run_dir import locked

WIDTHS = {"attention": "num_attention_heads", "ffn": "ffn_hidden_size", "stem": "hidden_size"}
STEP_TOKENS = 8192
Main = Callable[[Sequence[str] | None], int]


@pytest.fixture(scope="module")
def plot_run_main(repo_root: Path) -> Main:
    spec = importlib.util.spec_from_file_location("plot_run_tool", repo_root / "tools" / "plot_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Main = module.main
    return main


def write_lines(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_run(directory: Path, steps: int = 400, pruned: bool = True) -> None:
    """A run whose widths, scores and losses move as a real one's do."""
    directory.mkdir(parents=True, exist_ok=True)
    shape = {"hidden_size": 256, "ffn_hidden_size": 700, "num_attention_heads": 8}
    metrics: list[dict[str, object]] = []
    ledger: list[dict[str, object]] = []
    order = ("ffn", "ffn", "stem", "ffn", "attention", "ffn", "stem")
    for step in range(1, steps + 1):
        if pruned and steps * 0.1 < step < steps * 0.6:
            kind = order[step % len(order)] if step % 40 == 0 or order[step % len(order)] != "attention" else "ffn"
            if shape[WIDTHS[kind]] > 1:
                shape[WIDTHS[kind]] -= 1
                scores = {name: 2e-7 * (1 + step / steps * i) for i, name in enumerate(WIDTHS)}
                ledger.append(
                    {
                        "event": len(ledger) + 1,
                        "step": step,
                        "tokens": step * STEP_TOKENS,
                        "type": kind,
                        "removed": 0,
                        "scores": scores,
                        "shape": dict(shape),
                        "parameters": 4 * shape["hidden_size"] * 900,
                    }
                )
        if step % 4 == 0:
            metrics.append(
                {
                    "step": step,
                    "tokens": step * STEP_TOKENS,
                    "loss": 2 + 3 * math.exp(-step / 60) + math.sin(step) / 10,
                    "tokens_per_second": 9000 + 10 * step,
                    "mfu": 0.3 + step / 4000,
                    "parameters": 4 * 900 * 256,
                    **shape,
                }
            )
        if step % 50 == 0:
            metrics.append({"step": step, "val_loss": 2.1 + 3 * math.exp(-step / 60)})
    metrics[5]["loss"] = None  # a NaN loss
    write_lines(directory / "metrics.jsonl", metrics)
    if pruned:
        write_lines(directory / "ledger.jsonl", ledger)


def test_draws_all_four(tmp_path: Path, plot_run_main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path)
    assert plot_run_main([str(tmp_path)]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in printed] == ["saliency.png", "shape.png", "loss.png", "throughput.png"]
    for path in printed:
        assert path.parent == tmp_path / "plots"
        pixels = imread(path)
        assert pixels.shape[0] >= 600
        assert pixels.std() > 0.01  # something is drawn


def test_without_a_ledger_fewer_and_says_so(
    tmp_path: Path, plot_run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", pruned=False)
    assert plot_run_main([str(tmp_path / "run"), "--output", str(tmp_path / "pictures")]) == 0
    assert "nothing was pruned" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["loss.png", "throughput.png"]


def test_not_a_run_is_one_line_and_exit_2(
    tmp_path: Path, plot_run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plot_run_main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "no metrics.jsonl" in captured.err
    assert str(tmp_path) in captured.err
    assert not (tmp_path / "plots").exists()


class TestHtml:
    """The page itself is tested in tests/unit/report_page."""

    def test_a_page_and_no_picture(
        self, tmp_path: Path, plot_run_main: Main, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make_run(tmp_path)
        assert plot_run_main([str(tmp_path), "--html"]) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'plots' / 'run.html'}\n"
        assert [path.name for path in (tmp_path / "plots").iterdir()] == ["run.html"]
        assert plot_run_main([str(tmp_path), "--html", str(tmp_path / "own.html")]) == 0
        assert (tmp_path / "own.html").read_text().startswith("<!DOCTYPE html>")

    def test_watching_ends_with_the_run(
        self, tmp_path: Path, plot_run_main: Main, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_dir, page = tmp_path / "run", tmp_path / "run.html"
        make_run(run_dir, pruned=False)
        pages: list[str] = []
        with contextlib.ExitStack() as lock:
            lock.enter_context(locked(run_dir))

            def between(seconds: float) -> None:
                assert seconds == 7
                pages.append(page.read_text())
                if len(pages) == 2:
                    lock.close()
                    (run_dir / ".lock").unlink()

            monkeypatch.setattr(time, "sleep", between)
            assert plot_run_main([str(run_dir), "--html", str(page), "--watch", "7"]) == 0
        assert len(pages) == 2
        assert all('http-equiv="refresh" content="7"' in text for text in pages)
        assert "refresh" not in page.read_text()
        assert capsys.readouterr().out.startswith(f"{page}\nstopped: at step 400")

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--watch", "5"], "add --html"),
            (["--html", "--watch", "0.5"], "--watch 0.5 must be"),
            (["--html", "--watch", "nan"], "--watch nan must be"),
            (["--html", "page.html", "--output", "pictures"], "--output pictures is for PNGs"),
            (["--html", "."], "is a directory"),
        ],
    )
    def test_a_mistake_is_one_line(
        self,
        tmp_path: Path,
        plot_run_main: Main,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        flags: list[str],
        message: str,
    ) -> None:
        make_run(tmp_path / "run", steps=40)
        monkeypatch.chdir(tmp_path / "run")
        assert plot_run_main([".", *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_torn_last_lines_are_left_out(tmp_path: Path) -> None:
    make_run(tmp_path, steps=40)
    whole = read_run(tmp_path)
    for name in ("metrics.jsonl", "ledger.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 41, "tok')
    assert read_run(tmp_path) == whole


def test_damage_in_the_middle_is_an_error(
    tmp_path: Path, plot_run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, steps=40)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines[2] = lines[2][:10]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert plot_run_main([str(tmp_path)]) == 2
    assert "metrics.jsonl:3" in capsys.readouterr().err


def test_only_a_torn_line_is_an_error(tmp_path: Path, plot_run_main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    assert plot_run_main([str(tmp_path)]) == 2
    assert "no whole training line" in capsys.readouterr().err


def test_validation_tokens_are_filled_in(tmp_path: Path) -> None:
    make_run(tmp_path, steps=100)
    assert [record["tokens"] for record in read_run(tmp_path).validation] == [50 * STEP_TOKENS, 100 * STEP_TOKENS]


def test_source_widths_come_from_the_first_event(tmp_path: Path) -> None:
    make_run(tmp_path, steps=100)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text(lines[-2] + "\n")  # the early lines, with the source's widths, are gone
    assert source_widths(read_run(tmp_path)) == {"attention": 8, "ffn": 700, "stem": 256}
