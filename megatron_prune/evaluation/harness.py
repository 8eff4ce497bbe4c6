"""Runs lm-evaluation-harness, whose numbers are what others report, and says in one line what it lacks."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import yaml

from megatron_prune.errors import UserError
from megatron_prune.evaluation.scoring import first_line, load_causal_lm
from megatron_prune.tool import bars_on_terminals_only

_HUB: Final = "https://huggingface.co"
_HUB_SECONDS: Final = 5.0
#: Where lm-eval keeps the paper's tasks: to read all of its thousands of files takes a quarter of a minute.
_FOLDERS: Final = ("arc", "hellaswag", "mmlu/continuation", "openbookqa", "piqa", "super_glue/boolq", "winogrande")


@dataclasses.dataclass(frozen=True)
class Scores:
    """What lm-eval found.

    Attributes:
        tasks: measure (``acc``, ``acc_stderr``, ``acc_norm``, ...) by task or group of tasks, as fractions. The name of
            a filter of answers is part of the measure's: ``exact_match (strict-match)``.
        parameters: of the model.
        version: of lm-eval.
    """

    tasks: Mapping[str, Mapping[str, float]]
    parameters: int
    version: str


class DataMissing(UserError):
    """The questions of a task are neither on this machine nor to be had."""


def prepare_environment() -> bool:
    """Have libraries look for data on this machine alone if the hub does not answer; call before they are imported.

    Returns:
        Whether the hub may be asked.

    Raises:
        UserError: lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluation needs lm-evaluation-harness; pip install lm_eval")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    online = os.environ.get("HF_HUB_OFFLINE", "0") in ("0", "") and _hub_answers()
    if not online:  # else every task would retry for a minute
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    return online


def tasks_in(directory: Path) -> tuple[str, ...]:
    """Names of the tasks whose YAML files a directory holds.

    Raises:
        UserError: there are none, or a file that lm-eval would pass over without a word: one that cannot be read, and
            a second of the same name.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(directory), include_defaults=False)
    for file in sorted(directory.rglob("*.yaml")):
        name = _task_name(file)
        if name is None:
            continue
        if name not in manager.task_index:
            raise UserError(f"task file {file} is not understood by lm-eval; is a file that it includes missing?")
        taken = manager.task_index[name].yaml_path
        if not file.samefile(taken):
            raise UserError(f"task {name} is in both {taken} and {file}; rename one of them")
    found = tuple(manager.all_subtasks)
    if not found:
        raise UserError(f"--task-dir {directory} holds no task file of lm-eval (NAME.yaml with a key task:)")
    return found


def evaluate(
    directory: Path,
    tasks: Sequence[str],
    task_dir: Path | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    on_done: Callable[[str], None] = lambda name: None,
) -> Scores:
    """Zero-shot scores of a Hugging Face model directory.

    Args:
        directory: of the model and its tokenizer.
        tasks: names of lm-eval's tasks and groups.
        task_dir: task files that come before lm-eval's own, also under their names.
        batch_size: sequences at once.
        limit: questions of each task, for a trial; None for all.
        on_done: called with the name of each task once it is scored.

    Raises:
        DataMissing: the questions of a task cannot be loaded.
        UserError: there is no such task, a file of ``task_dir`` makes no questions, or the model cannot be loaded.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = [] if task_dir is None else [str(task_dir)]
    stock = [str(path) for folder in _FOLDERS if (path := Path(lm_eval.__file__).parent / "tasks" / folder).is_dir()]
    manager = TaskManager(include_path=[*stock, *own], include_defaults=False)  # the later ones take precedence
    if any(name not in manager.all_tasks for name in tasks):
        manager = TaskManager(include_path=own)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"lm-eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists them, --task-dir adds others")
    scores: dict[str, dict[str, float]] = {}
    with _quiet():
        asked = {name: _load(manager, name, task_dir, limit) for name in tasks}
        loaded, tokenizer = load_causal_lm(directory, "auto")
        # lm-eval 0.4.13's cache mistakes one question for another where both are one text, parted at different places.
        model: Any = HFLM(
            loaded.to("cuda" if torch.cuda.is_available() else "cpu"),
            tokenizer=tokenizer,
            batch_size=batch_size,
            logits_cache=False,
        )
        for name, parts in asked.items():
            found = lm_eval.simple_evaluate(
                model=model, tasks=parts, num_fewshot=0, limit=limit, log_samples=False, task_manager=manager
            )
            assert found is not None, "only ranks other than the first get nothing"
            scores |= {part: _measures(values) for part, values in found["results"].items()}
            on_done(name)
    return Scores(scores, int(model.model.num_parameters()), str(lm_eval.__version__))


def _load(manager: Any, name: str, task_dir: Path | None, limit: int | None) -> list[Any]:
    """A task with its questions, or a group of tasks."""
    file = manager.task_index[name].yaml_path
    if task_dir is not None and file is not None and file.resolve().is_relative_to(task_dir.resolve()):
        try:
            parts = list(manager.load([name])["tasks"].values())
            for part in parts:
                part.build_all_requests(limit=limit)  # before the model is loaded: templates may not fit the data
        except Exception as error:  # the user's file, and code that it may name, in lm-eval's hands
            why = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"task file {file} makes no questions ({why}); mend the file or its data") from error
        return parts
    try:
        found = manager.load([name])
    except (OSError, ValueError) as error:  # the kinds of datasets and of the hub's client
        raise DataMissing(
            f"the data of task {name} is not here and cannot be fetched ({first_line(error)}); load it where a "
            "network is and bring HF_HOME along, give --task-dir with tasks of your own, or --suite offline"
        ) from error
    return [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())


def _task_name(file: Path) -> str | None:
    """The task that a YAML file describes; None for a group or a part that others include.

    Raises:
        UserError: it is no YAML.
    """
    try:
        # Without making values of it, as lm-eval has tags of its own.
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        why = first_line(error) if mark is None else f"line {mark.line + 1}: {getattr(error, 'problem', '')}"
        raise UserError(f"task file {file} cannot be read ({why}); mend it or take it out of --task-dir") from error
    entries = {key.value: value for key, value in root.value} if isinstance(root, yaml.MappingNode) else {}
    task = entries.get("task")
    return str(task.value) if isinstance(task, yaml.ScalarNode) and "group" not in entries else None


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars in a log, no warnings of lm-eval's libraries, and none of git, which it asks about the directory."""
    import lm_eval.evaluator

    ask = lm_eval.evaluator.get_git_commit_hash
    lm_eval.evaluator.get_git_commit_hash = lambda: None
    try:
        with warnings.catch_warnings(), bars_on_terminals_only():
            warnings.simplefilter("ignore")
            yield
    finally:
        lm_eval.evaluator.get_git_commit_hash = ask


def _measures(values: Mapping[str, Any]) -> dict[str, float]:
    """``{"acc,none": 0.5, "alias": "x"}`` without what is no number; see :class:`Scores` for filters' names."""
    kept = {key.replace(",none", ""): value for key, value in values.items() if "," in key}
    named = {key if "," not in key else f"{key.replace(',', ' (')})": value for key, value in kept.items()}
    return {key: float(value) for key, value in named.items() if isinstance(value, int | float)}


def _hub_answers() -> bool:
    try:
        with urllib.request.urlopen(os.environ.get("HF_ENDPOINT", _HUB), timeout=_HUB_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
