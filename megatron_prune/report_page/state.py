"""Whether a run goes on, seen from outside."""

from __future__ import annotations

import dataclasses
import socket
import time
from pathlib import Path
from typing import Final, Literal

from megatron_prune.training.report import METRICS_FILE
from megatron_prune.training.run_dir import lock_owner

#: A run on another machine, whose lock may not be seen from here, is taken to go on if it wrote so lately.
RECENT_SECONDS: Final = 300.0


@dataclasses.dataclass(frozen=True)
class State:
    """State of a run.

    Attributes:
        name: ``running``; ``finished`` with all its steps; ``stopped`` before, on purpose or not.
        why: how that is known, in a sentence.
    """

    name: Literal["running", "finished", "stopped"]
    why: str


def state_of(run_dir: Path, last_step: int, train_iters: int | None) -> State:
    """Tell from the lock of the run directory and the last step that was logged.

    Args:
        run_dir: the run directory.
        last_step: of metrics.jsonl.
        train_iters: steps of the run, or None if they are not known.
    """
    owner = lock_owner(run_dir)
    if owner is not None and owner.held:
        return State("running", f"held by {owner.name}")
    if train_iters and last_step >= train_iters:
        return State("finished", f"all {train_iters:,} steps are done")
    if owner is not None and not owner.name.startswith(f"{socket.gethostname()},"):
        age = _age(run_dir / METRICS_FILE)
        if age is not None and age < RECENT_SECONDS:
            return State("running", f"wrote {age:.0f} seconds ago, on {owner.name}")
    return State("stopped", f"at step {last_step:,}; no process holds the directory: the same command resumes")


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None
