"""Run by launcher.py on every rank: a run of which one rank kills itself, from inside one place.

``kill_worker.py RANK PLACE CALL flags...``: that rank sends itself SIGKILL at the CALLth time that it comes to the
place, or, for the place ``moment``, after CALL milliseconds of training. What it never comes to kills nobody.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_prune import pretrain
from megatron_prune.checkpoint import directory, hf_export, writer
from megatron_prune.pruning.ledger import Ledger
from megatron_prune.training import engine
from megatron_prune.training.engine import PruningEngine
from megatron_prune.training.loop import Trainer
from megatron_prune.training.pruner import Pruner
from megatron_prune.training.report import Reporter

#: Place -> a function, whether the process dies before it or after it, and how often a run comes by, about.
PLACES: dict[str, tuple[Any, str, str, int]] = {
    "training step": (PruningEngine, "train_step", "before", 14),
    "decision": (Pruner, "decide", "after", 7),
    "zeroing": (engine, "zero_fragment_", "before", 400),
    "event recorded": (Ledger, "append", "after", 63),
    "compaction": (PruningEngine, "compact", "before", 6),
    "states moving": (PruningEngine, "_fill", "before", 300),
    "shard begun": (writer, "write_shard", "before", 5),
    "shard written": (writer, "write_shard", "after", 5),
    "file synced": (directory, "write_synced", "after", 10),
    "directory synced": (directory, "sync_directory", "after", 10),
    "before a rename": (Path, "rename", "before", 10),
    "after a rename": (Path, "rename", "after", 10),
    "export": (hf_export, "save_file", "before", 1),
    "exported": (hf_export, "save_file", "after", 1),
    "metrics": (Reporter, "log", "after", 16),
}
MOMENT, MOMENTS = "moment", 1500  # ms


class Killer:
    """Ends this process at one of its visits to a place."""

    def __init__(self, place: str, call: int) -> None:
        self._left = call
        if place == MOMENT:
            self._replace(Trainer, "run", lambda run: self._timed(run, call))
            return
        owner, name, when, _ = PLACES[place]
        self._replace(owner, name, lambda function: self._wrapped(function, when))

    def _replace(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        setattr(owner, name, wrap(getattr(owner, name)))

    def _wrapped(self, function: Callable[..., Any], when: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if when == "before" and self._left == 0:
                die()
            result = function(*args, **kwargs)
            if when == "after" and self._left == 0:
                die()
            return result

        return call

    def _timed(self, run: Callable[..., Any], milliseconds: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            timer = threading.Timer(milliseconds / 1000, die)
            timer.daemon = True
            timer.start()
            return run(*args, **kwargs)

        return call


def die() -> None:
    """As a scheduler, the kernel or a power cut ends a process."""
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """Run, as far as it goes."""
    rank, place, call = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
    if rank == os.environ["RANK"]:
        Killer(place, call)
    return pretrain.main()


if __name__ == "__main__":
    sys.exit(main())
