"""The suite for machines without a hub: cloze questions from the standard library's source, as tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import yaml

from megatron_prune.data.documents import stdlib_files
from megatron_prune.evaluation.cloze import make_questions, task_names, write_questions

#: Part of the standard library's text, counted from its end, that questions are made of. The demo trains on all but
#: the last 4 % of its tokens.
HELD_OUT: Final = 0.035
QUESTIONS: Final = 300  # per task; a standard error of 2 to 3 points
SEED: Final = 0


def write_offline_tasks(directory: Path, questions: int = QUESTIONS) -> tuple[str, ...]:
    """Write questions and a task file of lm-eval for each kind of question.

    Args:
        directory: made if missing. ``lm_eval --include_path`` takes it too.
        questions: how many of each kind.

    Returns:
        The tasks' names.

    Raises:
        UserError: the text does not yield so many questions.
    """
    documents = held_out_documents()
    directory.mkdir(parents=True, exist_ok=True)
    names = []
    for kind in task_names():
        name = f"offline_{kind}"
        file = directory.absolute() / f"{name}.jsonl"
        write_questions(file, make_questions(kind, documents, questions, SEED))
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(_task(name, file), sort_keys=False), encoding="utf-8")
        names.append(name)
    return tuple(names)


def held_out_documents() -> list[str]:
    """The last files of the running interpreter's standard library, as the demo orders them."""
    texts = [path.read_bytes().decode("utf-8", errors="replace") for path in stdlib_files()]
    return _tail(texts, HELD_OUT * sum(map(len, texts)))


def _tail(texts: Sequence[str], room: float) -> list[str]:
    """As many texts from the end as fit."""
    start = len(texts)
    while start and len(texts[start - 1]) <= room:
        start -= 1
        room -= len(texts[start])
    return list(texts[start:])


def _task(name: str, file: Path) -> dict[str, object]:
    """A task file: fields are named, not rendered, so that no text is taken for a template."""
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(file.parent / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": metrics,
        "metadata": {"version": 1.0},
    }
