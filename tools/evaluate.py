#!/usr/bin/env python
"""Zero-shot scores of a model by lm-evaluation-harness, as a row of the paper's table beside its published rows.

    python tools/evaluate.py runs/457m                       # a run directory: its newest checkpoint
    python tools/evaluate.py exported/457m --mmlu --output scores.json
    python tools/evaluate.py exported/457m --suite offline   # no hub needed
    python tools/evaluate.py exported/457m --task-dir my_tasks

The suite `commonsense` is the paper's seven tasks. `offline` asks cloze questions made of Python's standard library,
which every machine has. The default, `auto`, is commonsense where its data can be loaded and offline where not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_prune.checkpoint.run_export import model_directory
from megatron_prune.errors import UserError
from megatron_prune.evaluation.harness import DataMissing, Scores, evaluate, prepare_environment, tasks_in
from megatron_prune.evaluation.offline import write_offline_tasks
from megatron_prune.evaluation.published import COMMON_SENSE, MMLU
from megatron_prune.evaluation.report import paper_row, paper_table, plain_rows, plain_table
from megatron_prune.tool import check_output, files_of, run_tool

SUITES = ("auto", "commonsense", "offline")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; returns the exit code: 0, 2 for bad input, 1 anything else."""
    options = _parser().parse_args(argv)
    return run_tool(lambda: _evaluate(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="run directory, or Hugging Face model directory")
    parser.add_argument("--suite", choices=SUITES, default="auto", help="what to ask (default: auto, see above)")
    parser.add_argument("--mmlu", action="store_true", help="MMLU in cloze form as well")
    parser.add_argument("--task-dir", type=Path, metavar="DIR", help="run the lm-eval task files of DIR instead")
    parser.add_argument("--keep-tasks", type=Path, metavar="DIR", help="keep the offline suite's task files in DIR")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences at once (default: 16)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task, for a trial")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write everything lm-eval found as JSON")
    return parser


def _evaluate(options: argparse.Namespace) -> None:
    if options.batch_size < 1 or (options.limit is not None and options.limit < 1):
        raise UserError("--batch-size and --limit must be 1 or more")
    _check_together(options)
    check_output("--output", options.output, files_of(options.model))
    if options.keep_tasks is not None:
        check_output("--keep-tasks", options.keep_tasks / "offline_next_word.yaml")
    online = prepare_environment()
    directory = model_directory(options.model)
    if directory != options.model:
        print(f"evaluating {directory}, the run's newest checkpoint", flush=True)
    if options.task_dir is not None:
        tasks = tasks_in(options.task_dir)
        _report(options, str(options.task_dir), _scores(options, directory, tasks, options.task_dir), tasks)
        return
    if options.suite != "offline":
        tasks = (*(task for task, _ in COMMON_SENSE.values()), *((MMLU[0],) if options.mmlu else ()))
        try:
            _report(options, "commonsense", _scores(options, directory, tasks, None))
            return
        except DataMissing as error:
            if options.suite == "commonsense" or options.mmlu:
                raise
            why = "" if online else "; the hub does not answer"
            print(f"suite offline, because {str(error).split(';', 1)[0]}{why}", flush=True)
    _offline(options, directory)


def _check_together(options: argparse.Namespace) -> None:
    """Refuse flags that nothing would heed."""
    if options.task_dir is not None and options.suite != "auto":
        raise UserError(f"--suite {options.suite} does not go with --task-dir, which takes its place; drop one of them")
    if options.task_dir is not None and options.mmlu:
        raise UserError("--mmlu is not among the tasks of --task-dir; drop one of them")
    if options.keep_tasks is not None and (options.task_dir is not None or options.suite == "commonsense"):
        raise UserError(f"--keep-tasks {options.keep_tasks} keeps the offline suite, which is not asked; drop it")
    if options.mmlu and options.suite == "offline":
        raise UserError("--mmlu is not in --suite offline; drop one of them")


def _offline(options: argparse.Namespace, directory: Path) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        task_dir = Path(options.keep_tasks or scratch)
        tasks = write_offline_tasks(task_dir)
        scores = _scores(options, directory, tasks, task_dir)
    _report(options, "offline", scores, tasks)
    print("Percent of right answers of four; questions made of the end of Python's standard library. They rank models")
    print("that were trained on such text, and say nothing about others.")


def _scores(options: argparse.Namespace, directory: Path, tasks: Sequence[str], task_dir: Path | None) -> Scores:
    start = time.monotonic()
    done = 0

    def show(name: str) -> None:
        nonlocal done
        done += 1
        print(f"{name} scored, {done} of {len(tasks)}, after {time.monotonic() - start:.0f} s", flush=True)

    return evaluate(directory, tasks, task_dir, options.batch_size, options.limit, show)


def _report(options: argparse.Namespace, suite: str, scores: Scores, own: Sequence[str] = ()) -> None:
    """Print the paper's row, or every measure of tasks that are not the paper's, and write all."""
    name = options.model.resolve().name
    row: Mapping[str, object]
    if own:
        row = rows = plain_rows(scores, own)
        lines = plain_table(name, rows, own)
    else:
        row = paper = paper_row(scores)
        lines = paper_table(name, paper, scores.parameters)
    print("\n".join(lines), flush=True)
    if options.output is not None:
        _write(options.output, str(options.model), suite, row, scores)


def _write(path: Path, model: str, suite: str, row: Mapping[str, object], scores: Scores) -> None:
    content = {
        "model": model,
        "suite": suite,
        "parameters": scores.parameters,
        "lm_eval": scores.version,
        "row": row,
        "tasks": scores.tasks,
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
