"""The paper's rows: copied without a slip, and put beside models of their size."""

from __future__ import annotations

import pytest

from megatron_prune.evaluation.harness import Scores
from megatron_prune.evaluation.published import COMMON_SENSE, MMLU, published_near
from megatron_prune.evaluation.report import paper_row, paper_table, plain_rows, plain_table

ALL = [row for size in (134, 457, 1100, 2020, 3370) for row in published_near(size * 10**6)]


def test_each_average_is_that_of_its_row() -> None:
    assert len({(row.model, row.scores) for row in ALL}) == 34
    for row in ALL:
        *seven, average = row.scores
        assert len(seven) == 7
        assert average == pytest.approx(sum(seven) / 7, abs=0.011), row.model


def test_rows_of_similar_size() -> None:
    names = {row.model for row in published_near(457_000_000)}
    assert {"EfficientLLM-457M 500B", "Qwen2.5-0.5B 17T", "Pythia-410M 300B"} <= names
    assert not names & {"SmolLM-135M 600B", "Llama3.2-1B", "EfficientLLM 70 %"}
    assert published_near(425_600) == []


def test_the_row_takes_the_measure_of_each_task() -> None:
    tasks = {task: {"acc": 0.25, "acc_norm": 0.5} for task, _ in COMMON_SENSE.values()}
    scores = Scores({**tasks, MMLU[0]: {"acc": 0.3}, "other": {"acc": 1.0}}, 457_000_000, "0")
    row = paper_row(scores)
    assert row == {
        "MMLU": pytest.approx(30),
        "ARC-c": 50,
        "ARC-e": 25,
        "BoolQ": 25,
        "HellaSwag": 50,
        "OBQA": 50,
        "PIQA": 25,
        "WinoGrande": 25,
        "Avg.": pytest.approx(250 / 7),
    }
    heading, _, own, note, *published = paper_table("mine", row, scores.parameters)
    assert heading.split() == [
        "model",
        "MMLU",
        "ARC-c",
        "ARC-e",
        "BoolQ",
        "HellaSwag",
        "OBQA",
        "PIQA",
        "WinoGrande",
        "Avg.",
    ]
    assert own.split() == ["mine", "30.00", "50.00", "25.00", "25.00", "50.00", "50.00", "25.00", "25.00", "35.71"]
    assert "as published" in note
    (line,) = [line for line in published if line.startswith("EfficientLLM-457M 500B")]
    assert line.split()[2:] == ["34.54", "38.40", "72.10", "62.42", "56.84", "40.40", "73.83", "57.46", "57.35"]


def test_no_average_of_some_tasks() -> None:
    row = paper_row(Scores({"piqa": {"acc": 0.5}}, 1000, "0"))
    assert row == {"PIQA": 50}
    assert paper_table("mine", row, 1000)[-1].split() == ["mine", "-", "-", "-", "-", "-", "50.00", "-", "-"]


def test_tasks_that_are_not_the_paper_s() -> None:
    tasks = {"a": {"acc": 0.5, "acc_stderr": 0.1}, "b": {"acc": 0.25, "acc_norm": 0.75}, "c": {"bleu": 12.5}}
    rows = plain_rows(Scores(tasks | {"part of c": {"bleu": 1.0}}, 1, "0"), ["a", "b", "c"])
    assert rows == {
        "acc": {"a": 50, "b": 25, "Avg.": 37.5},
        "acc_norm": {"b": 75, "Avg.": 75},
        "bleu": {"c": 12.5, "Avg.": 12.5},
    }
    heading, _, *lines = plain_table("mine", rows, ["a", "b", "c"])
    assert heading.split() == ["model", "a", "b", "c", "Avg."]
    assert [line.split() for line in lines] == [
        ["mine", "acc", "50.00", "25.00", "-", "37.50"],
        ["mine", "acc_norm", "-", "75.00", "-", "75.00"],
        ["mine", "bleu", "-", "-", "12.50", "12.50"],
    ]
