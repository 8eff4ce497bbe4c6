"""Run by launcher.py on every rank: a run that prunes by one metric while all others are asked for their choices too.

Beside the run directory's files the main process leaves ``choices.json``: for every step that prunes and every metric
the groups it would have removed. Every rank leaves ``rankN.npz`` with ``METRIC/heads``, ``METRIC/ffn`` and
``METRIC/stem`` of the first step, at weights equal to the source's, and the layers its stage holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np

from megatron_prune import pretrain
from megatron_prune.pruning.groups import GroupType
from megatron_prune.pruning.metrics import Metric, uses_hessian_diagonal
from megatron_prune.pruning.planner import Decision
from megatron_prune.training import setup
from megatron_prune.training.loop import Trainer
from megatron_prune.training.pruner import Pruner


def choosers(pruner: Pruner) -> dict[str, Pruner]:
    """One pruner for every metric, and for both sources of the Hessian's diagonal."""
    rules, found = dataclasses.replace(pruner._rules, second_order=False), {}
    for metric in get_args(Metric):
        found[metric] = dataclasses.replace(rules, metric=metric)
        if uses_hessian_diagonal(metric):
            found[f"{metric} adam"] = dataclasses.replace(rules, metric=metric, diagonal="adam")
    return {name: Pruner(pruner._engine, pruner._mesh, rules) for name, rules in found.items()}


class Witness:
    """Asks all metrics wherever the trainer asks its own."""

    def __init__(self) -> None:
        self.vectors: dict[str, Any] = {}
        self.choices: list[dict[str, Any]] = []
        self.directory = Path()

    def watch(self, trainer: Trainer) -> Trainer:
        """Observe every decision of a trainer; returns it."""
        own = trainer._pruner
        assert isinstance(own, Pruner)
        others, decide = choosers(own), own.decide
        observers = [pruner._observer for pruner in (own, *others.values())]

        @contextlib.contextmanager
        def watching() -> Iterator[None]:
            with contextlib.ExitStack() as watches:
                for observer in observers:
                    watches.enter_context(observer.watching())
                yield

        def decide_all(step: int, spent: int, doubted: Callable[[Decision], bool]) -> GroupType | None:
            for name, pruner in others.items():
                if step == 0:
                    vectors = pruner._measure(step)
                    parts = {"heads": vectors.heads, "ffn": vectors.ffn, "stem": vectors.stem}
                    self.vectors |= {f"{name}/{key}": value for key, value in parts.items()}
                pruner.decide(step, spent, lambda decision: False)
                groups = [(decision.group.type, decision.group.listed()) for decision in pruner._pending]
                self.choices.append({"step": step, "metric": name, "groups": groups})
                pruner.discard()
            return decide(step, spent, doubted)

        trainer.engine.observe = watching
        setattr(own, "decide", decide_all)  # noqa: B010  # mypy: a method is replaced
        self.vectors["layers"] = list(trainer.engine.layers)
        assert trainer.config.run.directory is not None
        self.directory = Path(trainer.config.run.directory)
        return trainer

    def write(self) -> None:
        """Write what was seen; the trainer must have run."""
        rank = int(os.environ["RANK"])
        np.savez(self.directory / f"rank{rank}.npz", **self.vectors)
        if rank == 0:
            (self.directory / "choices.json").write_text(json.dumps(self.choices))


def main() -> int:
    """Train, then write what was seen."""
    witness, build = Witness(), setup.build_trainer
    # pretrain imports it late
    setattr(setup, "build_trainer", lambda *args, **named: witness.watch(build(*args, **named)))  # noqa: B010
    code = pretrain.main()
    if code == 0:
        witness.write()
    return code


if __name__ == "__main__":
    sys.exit(main())
