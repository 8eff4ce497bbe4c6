"""Cloze questions: the right choice is what the text says, and the same seed asks the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prune.errors import UserError
from megatron_prune.evaluation.cloze import (
    LENGTH_FACTOR,
    NUM_CHOICES,
    Question,
    make_questions,
    read_questions,
    task_names,
    write_questions,
)


@pytest.fixture(scope="module")
def documents(repo_root: Path) -> list[str]:
    """Some of the project's own sources."""
    return [path.read_text() for path in sorted((repo_root / "megatron_prune" / "data").glob("*.py"))]


@pytest.mark.parametrize("task", task_names())
def test_the_answer_is_how_the_document_goes_on(task: str, documents: list[str]) -> None:
    for question in make_questions(task, documents, 30, seed=1):
        truth = question.question + question.choices[question.answer]
        assert any(truth in "\n".join(line.rstrip() for line in text.splitlines()) for text in documents)


@pytest.mark.parametrize("task", task_names())
def test_choices_are_as_many_and_none_begins_another(task: str, documents: list[str]) -> None:
    for question in make_questions(task, documents, 30, seed=2):
        assert len(question.choices) == NUM_CHOICES
        pairs = [(a, b) for a in question.choices for b in question.choices if a is not b]
        assert not any(a.startswith(b) for a, b in pairs)


def test_lengths_do_not_give_the_answer_away(documents: list[str]) -> None:
    for task in ("next_word", "line_end"):
        for question in make_questions(task, documents, 30, seed=3):
            truth = len(question.choices[question.answer])
            assert all(len(c) <= LENGTH_FACTOR * truth <= LENGTH_FACTOR**2 * len(c) for c in question.choices)


def test_names_occur_before(documents: list[str]) -> None:
    for question in make_questions("next_name", documents, 30, seed=4):
        assert all(choice in question.question for choice in question.choices)


def test_answers_are_spread_over_the_places(documents: list[str]) -> None:
    answers = [question.answer for question in make_questions("next_word", documents, 100, seed=5)]
    assert all(10 <= answers.count(place) <= 45 for place in range(NUM_CHOICES))


def test_a_seed_is_a_set_of_questions(documents: list[str]) -> None:
    first = make_questions("next_word", documents, 20, seed=6)
    assert first == make_questions("next_word", documents, 20, seed=6)
    assert first != make_questions("next_word", documents, 20, seed=7)
    assert len({(q.question, q.choices) for q in first}) == 20


def test_files_hold_every_character(tmp_path: Path, documents: list[str]) -> None:
    odd = Question("a\u2028b\n", ("ü", " \x0c"), 1)
    questions = [odd, *make_questions("line_end", documents, 5, seed=8)]
    write_questions(tmp_path / "q.jsonl", questions)
    assert read_questions(tmp_path / "q.jsonl") == questions
    first = json.loads((tmp_path / "q.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert first == {"question": "a\u2028b\n", "choices": ["ü", " \x0c"], "answer": 1}


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{",
        '{"question": "a"}',
        '{"question": "a", "choices": ["b", "c"], "answer": 2}',
        '{"question": "a", "choices": ["b", ""], "answer": 0}',
        '{"question": "a", "choices": ["b"], "answer": 0}',
        '{"question": 1, "choices": ["b", "c"], "answer": 0}',
        '{"question": "a", "choices": "bc", "answer": 0}',
        '{"question": "a", "choices": ["b", "c"], "answer": true}',
    ],
)
def test_what_is_no_question_is_told_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "a", "choices": ["b", "c"], "answer": 0}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2 is no question"):
        read_questions(path)


@pytest.mark.parametrize("task", task_names())
def test_one_document_is_enough(task: str, documents: list[str]) -> None:
    longest = max(documents, key=len)
    assert len(make_questions(task, [longest], 10, seed=9)) == 10


def test_too_little_text_is_told(documents: list[str]) -> None:
    with pytest.raises(UserError, match="more text than a line"):
        make_questions("next_word", ["one line of text"], 1, seed=0)
    with pytest.raises(UserError, match=r"yield \d+ of 5 questions"):
        make_questions("next_word", ["x = 1\n", "y = 2\n"], 5, seed=0)
    with pytest.raises(UserError, match="unknown cloze task 'next'; there are next_word"):
        make_questions("next", documents, 1, seed=0)


def test_missing_and_empty_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_questions(tmp_path / "empty.jsonl")
