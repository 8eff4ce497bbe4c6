"""Runs lm-evaluation-harness, whose numbers are what others report, and says in one line what it lacks."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from megatron_prune.checkpoint.hf_quiet import quiet_transformers
from megatron_prune.errors import UserError
from megatron_prune.evaluation.scoring import LOADING_ERRORS, first_line

_HUB: Final = "https://huggingface.co"
_HUB_SECONDS: Final = 5.0
#: Where lm-eval keeps the paper's tasks: to read all of its thousands of files takes a quarter of a minute.
_FOLDERS: Final = ("arc", "hellaswag", "mmlu/continuation", "openbookqa", "piqa", "super_glue/boolq", "winogrande")


@dataclasses.dataclass(frozen=True)
class Scores:
    """What lm-eval found.

    Attributes:
        tasks: measure (``acc``, ``acc_stderr``, ``acc_norm``, ...) by task or group of tasks, as fractions.
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
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds between the states of a progress bar in a log
    online = os.environ.get("HF_HUB_OFFLINE", "0") in ("0", "") and _hub_answers()
    if not online:  # else every task would retry for a minute
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    return online


def tasks_in(directory: Path) -> tuple[str, ...]:
    """Names of the tasks whose YAML files a directory holds.

    Raises:
        UserError: there are none.
    """
    from lm_eval.tasks import TaskManager

    found = tuple(TaskManager(include_path=str(directory), include_defaults=False).all_subtasks)
    if not found:
        raise UserError(f"--task-dir {directory} holds no task file of lm-eval (NAME.yaml with a key task:)")
    return found


def evaluate(
    directory: Path,
    tasks: Sequence[str],
    task_dir: Path | None = None,
    batch_size: int = 16,
    limit: int | None = None,
) -> Scores:
    """Zero-shot scores of a Hugging Face model directory.

    Args:
        directory: of the model and its tokenizer.
        tasks: names of lm-eval's tasks and groups.
        task_dir: task files that come before lm-eval's own.
        batch_size: sequences at once.
        limit: questions of each task, for a trial; None for all.

    Raises:
        DataMissing: the questions of a task cannot be loaded.
        UserError: there is no such task, or the model cannot be loaded.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    quiet_transformers()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = [] if task_dir is None else [str(task_dir)]
    stock = [str(path) for folder in _FOLDERS if (path := Path(lm_eval.__file__).parent / "tasks" / folder).is_dir()]
    manager = TaskManager(include_path=[*stock, *own], include_defaults=False)  # the later ones take precedence
    if any(name not in manager.all_tasks for name in tasks):
        manager = TaskManager(include_path=own)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"lm-eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists them, --task-dir adds others")
    loaded = _load(manager, tasks)
    try:
        model: Any = HFLM(
            pretrained=str(directory),
            dtype="auto",
            batch_size=batch_size,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    except LOADING_ERRORS as error:
        raise UserError(f"{directory} is no model with a tokenizer ({first_line(error)}); give an export") from error
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=loaded,
        num_fewshot=0,
        limit=limit,
        log_samples=False,
        task_manager=manager,
    )
    assert found is not None, "only ranks other than the first get nothing"
    scores = {name: _measures(values) for name, values in found["results"].items()}
    return Scores(scores, int(model.model.num_parameters()), str(lm_eval.__version__))


def _load(manager: Any, tasks: Sequence[str]) -> list[Any]:
    """Tasks with their questions, one after the other so that an error names its task."""
    loaded: list[Any] = []
    for name in tasks:
        try:
            found = manager.load([name])
        except (OSError, ValueError) as error:  # the kinds of datasets and of the hub's client
            raise DataMissing(
                f"the data of task {name} is not here and cannot be fetched ({first_line(error)}); load it where a "
                "network is and bring HF_HOME along, give --task-dir with tasks of your own, or --suite offline"
            ) from error
        loaded += [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())
    return loaded


def _measures(values: Mapping[str, Any]) -> dict[str, float]:
    """``{"acc,none": 0.5, "alias": "x"}`` without what is no number, filters' names cut off."""
    kept = {key.split(",")[0]: value for key, value in values.items() if "," in key}
    return {key: float(value) for key, value in kept.items() if isinstance(value, int | float)}


def _hub_answers() -> bool:
    try:
        with urllib.request.urlopen(os.environ.get("HF_ENDPOINT", _HUB), timeout=_HUB_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
