"""lm-evaluation-harness from here: the same scores as by its own command, and as by our own ranking."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_prune.data.tokenizer import train_bpe
from megatron_prune.errors import UserError
from megatron_prune.evaluation.cloze import read_questions, task_names
from megatron_prune.evaluation.harness import DataMissing, Scores, evaluate, prepare_environment, tasks_in
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
    words = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}", "--device", "cpu"]
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


def test_questions_come_from_the_end_of_the_text() -> None:
    assert _tail(["aaaa", "bb", "ccc"], 5) == ["bb", "ccc"]
    assert _tail(["aaaa", "bb", "ccc"], 4) == ["ccc"]
    assert len(held_out_documents()) > 5
