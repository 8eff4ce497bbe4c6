"""Run by launcher.py on every rank: a whole run as ``pretrain_prune.py`` makes it, with two things written down.

Beside the run directory's files every rank leaves ``rankN.npz``: the saliency vectors it sees in the first step, at
weights equal to the source's, the layers its stage holds, and the steps after which tensors were cut.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune import pretrain
from megatron_prune.training import setup
from megatron_prune.training.engine import StepResult
from megatron_prune.training.loop import Trainer
from megatron_prune.training.pruner import Pruner


class Witness:
    """Wraps what a trainer calls, without changing what it does."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {"compactions": []}
        self.directory: str | None = None

    def watch(self, trainer: Trainer) -> Trainer:
        """Observe the first step and every compaction of a trainer; returns it."""
        engine, pruner = trainer.engine, trainer._pruner
        step, compact = engine.train_step, engine.compact
        assert pruner is not None

        def first_step(batches: Iterable[Any], lr: float, before_step: Callable[[], None] | None) -> StepResult:
            def measure() -> None:
                if isinstance(pruner, Pruner):
                    vectors = pruner._measure(0)
                    self.seen |= {"heads": vectors.heads, "ffn": vectors.ffn, "stem": vectors.stem}
                if before_step is not None:
                    before_step()

            setattr(engine, "train_step", step)  # noqa: B010  # mypy: a method is replaced
            return step(batches, lr, measure)

        def counted(*args: Any) -> None:
            self.seen["compactions"].append(trainer.progress.step)
            compact(*args)

        setattr(engine, "train_step", first_step)  # noqa: B010
        setattr(engine, "compact", counted)  # noqa: B010
        self.seen["layers"] = list(engine.layers)
        self.directory = trainer.config.run.directory
        return trainer

    def write(self) -> None:
        """Write what was seen; the trainer must have run."""
        assert self.directory is not None
        np.savez(Path(self.directory) / f"rank{os.environ['RANK']}.npz", **self.seen)


def main() -> int:
    """Train, then write what was seen."""
    witness, build = Witness(), setup.build_trainer
    setattr(setup, "build_trainer", lambda *args: witness.watch(build(*args)))  # noqa: B010  # pretrain imports it late
    code = pretrain.main()
    if code == 0:
        witness.write()
    return code


if __name__ == "__main__":
    sys.exit(main())
