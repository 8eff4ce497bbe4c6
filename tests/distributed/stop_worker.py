"""Run by launcher.py on every rank: a run that its last rank is asked to stop, from inside one phase.

``stop_worker.py PHASE CALL flags...`` raises SIGTERM when the phase's function is called for the CALLth time, and
writes the step at which that was to ``signalled`` in the run directory; PHASE ``none`` raises nothing, ``file`` makes
the stop file. Ends with 0 when the run ended as it should have: stopped, or for ``none`` finished.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_prune import pretrain
from megatron_prune.errors import EXIT_REQUEUE
from megatron_prune.training import callbacks, setup
from megatron_prune.training.engine import PruningEngine
from megatron_prune.training.loop import Trainer
from megatron_prune.training.pruner import Pruner
from megatron_prune.training.signals import STOP_FILE

#: Phase -> what runs in the middle of it.
FUNCTIONS: dict[str, tuple[Any, str]] = {
    "loading": (PruningEngine, "start"),
    "training": (PruningEngine, "train_step"),
    "file": (PruningEngine, "train_step"),
    "decision": (Pruner, "decide"),
    "zeroing": (PruningEngine, "remove"),
    "compaction": (PruningEngine, "compact"),
    "checkpoint": (callbacks, "save_checkpoint"),
    "validation": (PruningEngine, "evaluate"),
    "export": (callbacks, "export_verified"),
}


class Stopper:
    """Asks the run to stop at one call of one function."""

    def __init__(self, phase: str, call: int) -> None:
        self._phase = phase
        self._left = call
        self._trainer: Trainer | None = None

    def prepare(self) -> None:
        """Wrap the function of the phase, and what makes the trainer."""
        build = setup.build_trainer

        def keep(*args: Any) -> Trainer:
            self._trainer = build(*args)
            return self._trainer

        setattr(setup, "build_trainer", keep)  # noqa: B010  # mypy: a function is replaced
        owner, name = FUNCTIONS[self._phase]
        setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                self._ask()
            return function(*args, **kwargs)

        return call

    def _ask(self) -> None:
        save = Path(sys.argv[sys.argv.index("--save") + 1])
        step = 0 if self._trainer is None else self._trainer.progress.step
        save.mkdir(exist_ok=True)
        (save / "signalled").write_text(str(step))
        if self._phase == "file":
            (save / STOP_FILE).touch()
        else:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Run; 0 when it ended as it should."""
    phase, call = sys.argv.pop(1), int(sys.argv.pop(1))
    if phase == "none":
        return pretrain.main()
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        Stopper(phase, call).prepare()
    code = pretrain.main()
    ignored = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # what a launcher sends next must not change the code
    return 0 if code == EXIT_REQUEUE and ignored else code or 3


if __name__ == "__main__":
    sys.exit(main())
