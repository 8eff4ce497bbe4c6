"""The training loop, top to bottom. It knows steps and removals; everything else is a callback."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from megatron_prune.architecture import Architecture
from megatron_prune.checkpoint.manifest import Progress
from megatron_prune.config.schema import Config
from megatron_prune.errors import StopRequested
from megatron_prune.parallel.collectives import from_main, largest
from megatron_prune.parallel.mesh import Mesh
from megatron_prune.pruning.groups import units
from megatron_prune.pruning.ledger import Event, Ledger, shape_of
from megatron_prune.pruning.planner import Decision
from megatron_prune.training.batches import Batches
from megatron_prune.training.engine import PruningEngine, StepResult
from megatron_prune.training.lr import learning_rate
from megatron_prune.training.pruner import Pruner
from megatron_prune.training.signals import StopRequest


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What a callback is told of a step.

    Attributes:
        result: loss, gradient norm, applied or not.
        lr: learning rate used.
        trained_shape: the model the step's FLOPs were spent on.
        compacted: tensors were physically cut after it.
    """

    result: StepResult
    lr: float
    trained_shape: Architecture
    compacted: bool


class Callback(Protocol):
    """Something that happens beside training. Called on every rank, in the order of the list."""

    def after_removal(self, trainer: Trainer, event: Event) -> None:
        """A group was removed."""

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """A step and its removals are done."""

    def at_end(self, trainer: Trainer) -> None:
        """The run stops: finished, or asked to."""


class Trainer:
    """Runs the two stages: prune until the budget is met, then continue with a fresh schedule.

    Args:
        config: settings.
        engine: the model, started.
        pruner: decides and removes, or None when there is no target.
        batches: data.
        mesh: groups.
        ledger: record of removals.
        progress: where to start.
        callbacks: in order.
    """

    def __init__(
        self,
        config: Config,
        engine: PruningEngine,
        pruner: Pruner | None,
        batches: Batches,
        mesh: Mesh,
        ledger: Ledger,
        progress: Progress,
        callbacks: Sequence[Callback],
    ) -> None:
        self.config = config
        self.engine = engine
        self.batches = batches
        self.mesh = mesh
        self.ledger = ledger
        self.progress = progress
        self._pruner = pruner
        self._callbacks = callbacks

    @property
    def architecture(self) -> Architecture:
        """The live model."""
        return self.engine.partition.architecture()

    @property
    def tokens(self) -> int:
        """Training tokens consumed."""
        return self.progress.consumed_samples * self.config.data.seq_length

    @property
    def pruning(self) -> bool:
        """True while the budget is not met."""
        return self._pruner is not None and self.progress.continue_from is None

    def run(self, stop: StopRequest) -> None:
        """Train to ``train_iters``.

        Raises:
            StopRequested: asked to stop; the callbacks have saved everything.
        """
        while self.progress.step < self.config.train.train_iters:
            if largest(int(stop.reason is not None), self.mesh):
                reason = from_main(stop.reason, self.mesh) or "a signal on another rank"
                self._finish()
                raise StopRequested(f"stopped at step {self.progress.step} by {reason}; start again to go on")
            record = self._step()
            for callback in self._callbacks:
                callback.after_step(self, record)
        self._finish()

    def learning_rate(self) -> float:
        """Rate of the next step: warm-up then constant while pruning, then a fresh schedule to the end."""
        optim, progress = self.config.optim, self.progress
        if self.pruning:
            return learning_rate(
                progress.step,
                lr=optim.lr,
                min_lr=optim.lr,
                warmup=optim.lr_warmup_iters,
                total=self.config.train.train_iters,
                style="constant",
            )
        continued = progress.continue_from is not None
        start = progress.continue_from or 0
        return learning_rate(
            progress.step - start,
            lr=optim.continued_lr if continued else optim.lr,
            min_lr=optim.min_lr,
            warmup=optim.continued_warmup_iters if continued else optim.lr_warmup_iters,
            total=self.config.train.train_iters - start,
            style=optim.lr_decay_style,
            wsd_decay=optim.lr_wsd_decay_iters,
        )

    def _step(self) -> StepRecord:
        progress, shape, lr = self.progress, self.architecture, self.learning_rate()
        pruner = self._pruner if self.pruning else None
        decide = None
        if pruner is not None and pruner.due(progress.step, progress.units_spent):
            decide = lambda: pruner.decide(progress.step, progress.units_spent)  # noqa: E731
        result = self.engine.train_step(self.batches.training(progress.consumed_samples), lr, decide)
        self._advance(
            step=progress.step + 1,
            adam_steps=progress.adam_steps + result.applied,
            consumed_samples=progress.consumed_samples + self.config.train.global_batch_size,
        )
        compacted = False
        if pruner is not None and decide is not None:
            if result.applied:
                for decision in pruner.commit():
                    self._record(decision)
                compacted = self._compact_if_due()
            else:
                pruner.discard()
            if pruner.met:
                self._advance(continue_from=self.progress.step)
        return StepRecord(result, lr, shape, compacted)

    def _record(self, decision: Decision) -> None:
        arch, group = self.architecture, decision.group
        self._advance(
            events=self.progress.events + 1,
            units_spent=self.progress.units_spent + units(group.type, arch),
        )
        event = Event(
            event=self.progress.events,
            step=self.progress.step,
            tokens=self.tokens,
            type=group.type,
            removed=group.removed if isinstance(group.removed, int) else list(group.removed),
            scores={kind: score for kind, score in decision.scores.items()},
            shape=shape_of(arch),
            parameters=arch.num_parameters(),
        )
        self.ledger.append(event)
        for callback in self._callbacks:
            callback.after_removal(self, event)

    def _compact_if_due(self) -> bool:
        quantum, partition = self.config.prune.prune_align, self.engine.partition
        if not quantum or not partition.compaction_due(quantum):
            return False
        self.engine.compact(partition.compacted(quantum), self.progress.adam_steps)
        return True

    def mark_exported(self, name: str) -> None:
        """Remember that a budget's snapshot is written."""
        self._advance(exported=(*self.progress.exported, name))

    def _advance(self, **changes: Any) -> None:
        self.progress = dataclasses.replace(self.progress, **changes)

    def _finish(self) -> None:
        for callback in self._callbacks:
            callback.at_end(self)
