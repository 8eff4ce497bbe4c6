"""``tools/evaluate.py``: what it chooses and prints, lm-eval itself left out."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.evaluation.harness import DataMissing, Scores
from megatron_prune.evaluation.published import COMMON_SENSE

Main = Callable[[Sequence[str]], int]


class Harness:
    """Stands in for lm-eval: knows nothing of the hub."""

    def __init__(self, has_data: bool) -> None:
        self.has_data = has_data
        self.asked: list[tuple[str, ...]] = []

    def evaluate(
        self,
        directory: Path,
        tasks: Sequence[str],
        task_dir: Path | None,
        batch_size: int,
        limit: int | None,
        on_done: Callable[[str], None],
    ) -> Scores:
        """Every answer right half of the time."""
        self.asked.append(tuple(tasks))
        if task_dir is None and not self.has_data:
            raise DataMissing("the data of task arc_challenge is not here; do something")
        for task in tasks:
            on_done(task)
        return Scores({task: {"acc": 0.5, "acc_norm": 0.25} for task in tasks}, 134_000_000, "0.4")


@pytest.fixture
def tool(repo_root: Path) -> dict[str, Any]:
    module: dict[str, Any] = runpy.run_path(str(repo_root / "tools" / "evaluate.py"))
    module["_evaluate"].__globals__["prepare_environment"] = lambda: False
    module["_evaluate"].__globals__["write_offline_tasks"] = lambda directory: ("offline_a", "offline_b")
    return module


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return str(tmp_path / "model")


def use(tool: dict[str, Any], has_data: bool) -> Harness:
    harness = Harness(has_data)
    tool["_evaluate"].__globals__["evaluate"] = harness.evaluate
    return harness


def test_the_paper_s_tasks_where_their_data_is(
    tool: dict[str, Any], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harness = use(tool, has_data=True)
    assert tool["main"]([model, "--mmlu", "--output", str(tmp_path / "scores.json")]) == 0
    assert harness.asked == [(*(task for task, _ in COMMON_SENSE.values()), "mmlu_continuation")]
    printed = capsys.readouterr().out
    assert "EfficientLLM-134M 500B" in printed
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["suite"] == "commonsense"
    assert written["row"]["Avg."] == pytest.approx((3 * 25 + 4 * 50) / 7)
    assert written["tasks"]["piqa"] == {"acc": 0.5, "acc_norm": 0.25}


def test_the_offline_suite_where_it_is_not(
    tool: dict[str, Any], model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    harness = use(tool, has_data=False)
    assert tool["main"]([model]) == 0
    assert harness.asked[1] == ("offline_a", "offline_b")
    printed = capsys.readouterr().out
    assert "suite offline, because the data of task arc_challenge is not here; the hub does not answer" in printed
    assert "\noffline_b scored, 2 of 2, after 0 s\n" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["model", "acc", "50.00", "50.00", "50.00"] in lines
    assert ["model", "acc_norm", "25.00", "25.00", "25.00"] in lines


def test_ones_own_tasks_are_never_the_paper_s(
    tool: dict[str, Any],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use(tool, has_data=False)
    tool["_evaluate"].__globals__["tasks_in"] = lambda directory: ("mine", "piqa")
    monkeypatch.chdir(model)
    assert tool["main"]([".", "--task-dir", "tasks", "--output", str(tmp_path / "scores.json")]) == 0
    printed = capsys.readouterr().out
    assert "published" not in printed
    lines = [line.split() for line in printed.splitlines()]
    assert lines[2] == ["model", "mine", "piqa", "Avg."]
    assert lines[4] == ["model", "acc", "50.00", "50.00", "50.00"]
    assert json.loads((tmp_path / "scores.json").read_text())["row"]["acc_norm"]["piqa"] == 25


@pytest.mark.parametrize("flags", [["--suite", "commonsense"], ["--mmlu"]])
def test_what_was_asked_for_is_not_replaced(
    tool: dict[str, Any], model: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    use(tool, has_data=False)
    assert tool["main"]([model, *flags]) == 2
    assert capsys.readouterr().err == "error: the data of task arc_challenge is not here; do something\n"


def test_what_is_no_model(tool: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use(tool, has_data=True)
    assert tool["main"]([str(tmp_path)]) == 2
    assert "is neither a Hugging Face model directory nor the --save of a run" in capsys.readouterr().err
    assert tool["main"]([str(tmp_path), "--limit", "0"]) == 2


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--suite", "offline", "--mmlu"], "--mmlu is not in --suite offline"),
        (["--suite", "offline", "--task-dir", "d"], "does not go with --task-dir"),
        (["--mmlu", "--task-dir", "d"], "--mmlu is not among the tasks of --task-dir"),
        (["--suite", "commonsense", "--keep-tasks", "d"], "keeps the offline suite, which is not asked"),
    ],
)
def test_flags_that_nothing_would_heed(
    tool: dict[str, Any], model: str, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    use(tool, has_data=True)
    assert tool["main"]([model, *flags]) == 2
    assert complaint in capsys.readouterr().err
