"""Executing runs side by side, each in a process forked from one that has imported everything."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from megatron_prune.errors import MegatronPruneError
from megatron_prune.study.runs import LOG_FILE, Run

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

#: Settings that the libraries read as they are imported. One thread a run: runs side by side use the cores better, and
#: sums come in one order.
ENVIRONMENT: Final[Mapping[str, str]] = MappingProxyType(
    {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
)
_PATIENCE: Final = 10.0  # seconds in which a process that was told to end should
#: What workers execute, and their server has imported. Named and not imported: this process has no use for DeepSpeed.
_EXECUTE: Final = "megatron_prune.study.execute"


def execute_runs(runs: Sequence[Run], prefix: str, jobs: int) -> None:
    """Execute the runs that have no result yet; the others are passed over.

    Args:
        runs: each after those it needs.
        prefix: of the text.
        jobs: processes at once.

    Raises:
        MegatronPruneError: runs failed; all that do not need them are finished.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    pending = [run for run in runs if run.result() is None]
    if len(runs) > len(pending):
        print(f"{len(runs) - len(pending)} of {len(runs)} runs are finished already", flush=True)
    if not pending:
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_EXECUTE])
    running: dict[Any, tuple[Run, ForkServerProcess]] = {}
    progress, failed = _Progress(pending), list[Run]()
    try:
        while pending or running:
            ready = [run for run in pending if all(need.result() is not None for need in run.needs)]
            for run in ready[: jobs - len(running)]:
                pending.remove(run)
                process = context.Process(target=_execute, args=(run, prefix), name=run.key)
                process.start()
                running[process.sentinel] = (run, process)
            if not running:
                break  # what is left needs runs that failed
            for sentinel in wait(list(running)):
                run, process = running.pop(sentinel)
                process.join()
                failed += [] if progress.ended(run, process.exitcode) else [run]
    finally:
        _end([process for _, process in running.values()])
    if failed:
        names = ", ".join(run.key for run in failed)
        rest = f"; {len(pending)} runs that need them were not started" if pending else ""
        raise MegatronPruneError(f"{len(failed)} runs failed: {names}{rest}; their {LOG_FILE} says why")


def _execute(run: Run, prefix: str) -> None:
    importlib.import_module(_EXECUTE).run_in_worker(run, prefix)


class _Progress:
    """A line for every run that ends, with an estimate of the time that is left."""

    def __init__(self, pending: Sequence[Run]) -> None:
        self._began = time.monotonic()
        self._total, self._ended = len(pending), 0
        self._work, self._done = sum(run.work for run in pending), 0.0

    def ended(self, run: Run, code: int | None) -> bool:
        """Say how a run ended; returns True if it has a result."""
        self._ended += 1
        self._done += run.work
        elapsed = time.monotonic() - self._began
        left = elapsed / self._done * (self._work - self._done)
        result = run.result() if code == 0 else None
        if result is None:
            outcome = f"failed with exit code {code}: {_last_line(run.directory / LOG_FILE)}"
        else:
            losses = [f"{stage} {model['val_loss']:.3f}" for stage, model in result["models"].items()]
            outcome = "held-out loss " + ", ".join(losses)
        clock = f"{_minutes(elapsed)} elapsed, {_minutes(left)} left"
        print(f"[{self._ended}/{self._total}] {run.key}: {outcome}  ({clock})", flush=True)
        return result is not None


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "it wrote nothing")


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02}s"


def _end(processes: Sequence[ForkServerProcess]) -> None:
    """Tell processes to end, and kill those that do not: the next study starts their runs anew."""
    for process in processes:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGTERM)
    for process in processes:
        process.join(_PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
