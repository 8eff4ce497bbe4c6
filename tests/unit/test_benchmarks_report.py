"""The page of the benchmarks shows the tables that are there, whole, with the commands that made them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

CPU = {"torch": "2", "threads": 1, "cpu": "8 x a model", "cores": 8, "instructions": "avx2"}
GPU = {**CPU, "gpu": "a GPU"}
SPREAD = {"low": 1.1, "median": 1.25, "high": 1.4}
ONES = {"low": 1.0, "median": 1.0, "high": 1.0}
STEP_ROWS = [
    {"side": "ours", "ms a step": 10.0, "time / ours": ONES},
    {"side": "a peer", "ms a step": 1234.5, "time / ours": SPREAD},
]
COST_ROW = {
    "ratio": "1:9",
    "saliency %": 0.1,
    "communication %": 0.0,
    "choice %": 0.2,
    "zeroing %": 0.3,
    "compaction %": 0.4,
}


@pytest.fixture
def report(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    return importlib.import_module("report")


def write(directory: Path, name: str, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    directory.mkdir(exist_ok=True)
    document = {"benchmark": name, "machine": machine, "rows": rows, "command": f"make {name} once more"}
    (directory / f"{name}.json").write_text(json.dumps(document))


def test_without_tables_there_is_no_page(report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--render", "--tables", str(tmp_path / "tables"), "--docs", str(tmp_path / "docs")]
    assert report.main(options) == 2
    assert "has no tables" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


def test_the_page_shows_the_tables_that_are_there(report: Any, tmp_path: Path) -> None:
    tables, docs = tmp_path / "tables", tmp_path / "docs"
    write(tables, "step_30M_fp32_4x256", CPU, STEP_ROWS)
    write(tables, "gpu_step", GPU, [{"model": "one", "MFU %": 41.5}])
    assert report.main(["--render", "--tables", str(tables), "--docs", str(docs)]) == 0
    page = (docs / "performance.md").read_text()
    assert "| a peer | 1234 | 1.25 (1.1 .. 1.4) |" in page
    assert "`make step_30M_fp32_4x256 once more` on 8 cores, avx2, PyTorch 2, 1 thread(s):" in page
    assert "on a GPU, PyTorch 2" in page
    assert "a model" not in page
    assert page.count("\n## ") == 2
    assert "performance.png" in page
    assert (docs / "performance.png").stat().st_size > 0


def test_a_picture_of_older_tables_does_not_stay(report: Any, tmp_path: Path) -> None:
    tables, docs = tmp_path / "tables", tmp_path / "docs"
    docs.mkdir()
    (docs / "performance.png").write_bytes(b"old")
    write(tables, "gpu_step", GPU, [{"model": "one", "MFU %": 41.5}])
    assert report.main(["--render", "--tables", str(tables), "--docs", str(docs)]) == 0
    assert not (docs / "performance.png").exists()
    assert "performance.png" not in (docs / "performance.md").read_text()


@pytest.mark.usefixtures("report")
def test_what_the_picture_shows() -> None:
    plot = importlib.import_module("report_plot")
    kernel = {"matrix": "8x64", "dtypes": "fp32", "eager_to_kernel": SPREAD, "compile_to_kernel": ONES}
    tables = {
        "step_30M_fp32_4x256": {"rows": STEP_ROWS},
        "kernels": {"rows": [kernel, {**kernel, "matrix": "8x32", "eager_target": "-"}]},
        "cost_demo": {"rows": [COST_ROW]},
        "one_shot_100M": {"rows": [{"side": "one that failed", "all / ours": ""}]},
    }
    assert plot.peer_ratios(tables) == [
        ("a peer (step 30M fp32 4x256)", SPREAD),
        ("eager, 8x64 fp32 (kernels)", SPREAD),
        ("compile, 8x64 fp32 (kernels)", ONES),
    ]
    assert plot.cost_rows(tables) == [("1:9 (cost demo)", COST_ROW)]


def test_a_failed_benchmark_is_named_and_its_old_table_goes(
    report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tables, docs = tmp_path / "tables", tmp_path / "docs"
    write(tables, "step_30M_fp32_4x256", CPU, STEP_ROWS)
    write(tables, "kernels", CPU, [{"matrix": "old"}])
    broken = tmp_path / "benchmarks"
    broken.mkdir()
    (broken / "kernels.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.main(["--only", "kernels", "--tables", str(tables), "--docs", str(docs)]) == 1
    assert "failed: kernels" in capsys.readouterr().err
    assert "old" not in (docs / "performance.md").read_text()


def test_a_table_keeps_the_command_that_made_it(report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    script = 'import pathlib, sys\npathlib.Path(sys.argv[-1]).write_text(\'{"rows": [{"matrix": 1}]}\')\n'
    (tmp_path / "benchmarks" / "kernels.py").write_text(script)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (run,) = (run for run in report.RUNS if run.name == "kernels")
    assert report.measure(run, tmp_path)
    assert report.read_tables(tmp_path)["kernels"] == {
        "rows": [{"matrix": 1}],
        "command": report.shown_command(run),
    }


def test_every_run_of_the_report_is_a_benchmark_with_a_section(report: Any, repo_root: Path) -> None:
    assert len({run.name for run in report.RUNS}) == len(report.RUNS)
    for run in report.RUNS:
        assert (repo_root / "benchmarks" / run.command[0]).is_file()
        assert run.heading in report.NOTES


@pytest.mark.parametrize(
    ("value", "bounds", "said"),
    [
        (1.3, {"least": 1.2}, ">= 1.2 met"),
        (1.1, {"least": 1.2}, ">= 1.2 MISSED"),
        (1.04, {"least": 0.97, "most": 1.03}, ">= 0.97, <= 1.03 MISSED"),
        (1.0, {"least": 0.97, "most": 1.03}, ">= 0.97, <= 1.03 met"),
        (1.0, {}, ""),
    ],
)
@pytest.mark.usefixtures("report")
def test_verdicts(value: float, bounds: dict[str, float], said: str) -> None:
    assert importlib.import_module("timing").verdict(value, **bounds) == said
