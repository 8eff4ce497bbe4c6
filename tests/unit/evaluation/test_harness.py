"""lm-evaluation-harness from here: the same scores as by its own command, and as by our own ranking."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_prune.data.tokenizer import train_bpe
from megatron_prune.errors import UserError
from megatron_prune.evaluation.cloze import read_questions, task_names
from megatron_prune.evaluation.harness import DataMissing, Scores, _measures, evaluate, prepare_environment, tasks_in
from megatron_prune.evaluation.offline import _tail, held_out_documents, write_offline_tasks
from megatron_prune.evaluation.scoring import load_causal_lm, score_questions

VOCABULARY = 400
QUESTIONS = 12


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network, and no cache but an empty one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        assert not prepare_environment()
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    directory = tmp_path_factory.mktemp("model")
    train_bpe([(repo_root / "megatron_prune" / "training" / "loop.py").read_text()], VOCABULARY, directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,  # so that choices differ clearly
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    assert write_offline_tasks(directory, QUESTIONS) == tuple(f"offline_{kind}" for kind in task_names())
    return directory


@pytest.fixture(scope="module")
def scores(model: Path, task_dir: Path) -> Scores:
    return evaluate(model, tasks_in(task_dir), task_dir)


def test_our_ranking_gives_the_same_scores(scores: Scores, model: Path, task_dir: Path) -> None:
    loaded = load_causal_lm(model)
    seen = set()
    for name, found in scores.tasks.items():
        expected = score_questions(*loaded, read_questions(task_dir / f"{name}.jsonl"))
        assert (found["acc"], found["acc_norm"]) == (expected.acc, expected.acc_norm)
        assert found["acc_stderr"] == pytest.approx(expected.acc_stderr)
        seen |= {expected.acc, expected.acc_norm}
    assert len(seen) > 2  # not all the same by a common flaw
    assert scores.parameters == loaded[0].num_parameters()


def test_its_own_command_gives_the_same_scores(
    scores: Scores, model: Path, task_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import tasks
    from lm_eval.__main__ import cli_evaluate

    # It would read all of its own task files first, for a quarter of a minute.
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    words = ["lm_eval", "run", "--model", "hf", "--device", "cpu"]
    words += ["--model_args", f"pretrained={model},logits_cache=False"]
    words += ["--tasks", ",".join(tasks_in(task_dir)), "--include_path", str(task_dir), "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    cli_evaluate()
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())["results"]
    assert found.keys() == scores.tasks.keys()
    for name, values in scores.tasks.items():
        assert {key: found[name][f"{key},none"] for key in values} == values


def test_data_that_is_not_there(model: Path) -> None:
    with pytest.raises(DataMissing, match=r"the data of task arc_challenge .* bring HF_HOME along, give --task-dir"):
        evaluate(model, ["arc_challenge"])


def test_a_directory_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no task file of lm-eval"):
        tasks_in(tmp_path)


def write_task(directory: Path, name: str, file: str = "task", **changes: Any) -> None:
    """A task of four questions."""
    questions = [{"question": "a", "choices": [" b", " c"], "answer": index % 2} for index in range(4)]
    (directory / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    data = {"data_files": {"test": str(directory / "questions.jsonl")}, "cache_dir": str(directory / "cache")}
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": data,
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (directory / f"{file}.yaml").write_text(yaml.safe_dump(task | changes))


def test_a_task_of_ones_own_comes_before_lm_eval_s(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path, "piqa", metric_list=[{"metric": "acc_norm"}])
    done: list[str] = []
    scores = evaluate(model, tasks_in(tmp_path), tmp_path, on_done=done.append)
    assert scores.tasks["piqa"].keys() == {"acc_norm", "acc_norm_stderr"}
    assert scores.tasks["piqa"]["acc_norm"] == 0.5
    assert done == ["piqa"]
    assert capsys.readouterr().err == ""  # it is no terminal, and gets no bars


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"doc_to_text": "{{question"}, r"task.yaml makes no questions \(TemplateSyntaxError: "),
        ({"doc_to_text": "{{question.x.y}}"}, r"task.yaml makes no questions \(UndefinedError: "),
        ({"metric_list": [{"metric": "no_such"}]}, "task.yaml makes no questions"),
        ({"dataset_kwargs": {"data_files": {"test": "no_such.jsonl"}}}, "task.yaml makes no questions"),
    ],
)
def test_a_task_file_that_makes_no_questions(
    model: Path, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    write_task(tmp_path, "mine", **changes)
    with pytest.raises(UserError, match=complaint) as error:
        evaluate(model, tasks_in(tmp_path), tmp_path)
    assert "\n" not in str(error.value)


def test_a_task_file_is_not_passed_over(tmp_path: Path) -> None:
    write_task(tmp_path, "mine")
    (tmp_path / "broken.yaml").write_text("task: [a\n")
    with pytest.raises(UserError, match=r"broken.yaml cannot be read \(line 2: "):
        tasks_in(tmp_path)
    (tmp_path / "broken.yaml").write_text("task: other\ninclude: no_such.yaml\n")
    with pytest.raises(UserError, match=r"broken.yaml is not understood by lm-eval; .* includes missing"):
        tasks_in(tmp_path)
    (tmp_path / "broken.yaml").write_text("test_split: test\nprocess: !function utils.process\n")  # for others
    write_task(tmp_path, "other", "other", include="broken.yaml")
    (tmp_path / "group.yaml").write_text("group: both\ntask: [mine, other]\n")
    assert tasks_in(tmp_path) == ("mine", "other")
    write_task(tmp_path, "mine", "second")
    with pytest.raises(UserError, match=r"task mine is in both .*second.yaml and .*task.yaml"):
        tasks_in(tmp_path)


def test_filters_of_answers_are_told_apart() -> None:
    found = _measures({"alias": "x", "match,strict": 0.5, "match_stderr,strict": 0.1, "match,loose": 1, "acc,none": 0})
    assert found == {"match (strict)": 0.5, "match_stderr (strict)": 0.1, "match (loose)": 1, "acc": 0}


def test_questions_come_from_the_end_of_the_text() -> None:
    assert _tail(["aaaa", "bb", "ccc"], 5) == ["bb", "ccc"]
    assert _tail(["aaaa", "bb", "ccc"], 4) == ["ccc"]
    assert len(held_out_documents()) > 5
