"""The training loop, top to bottom. It knows steps and removals; everything else is a callback."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from megatron_prune.architecture import Architecture
from megatron_prune.checkpoint.manifest import Manifest, Progress
from megatron_prune.config.schema import Config
from megatron_prune.errors import MegatronPruneError, StopRequested
from megatron_prune.parallel.collectives import from_main, largest
from megatron_prune.parallel.mesh import Mesh
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.phases import Phases
from megatron_prune.parallel.states import SlicedStates, StateSource
from megatron_prune.pruning.groups import GroupType, units
from megatron_prune.pruning.ledger import Event, Ledger, shape_of
from megatron_prune.pruning.planner import Decision
from megatron_prune.training.batches import Batches
from megatron_prune.training.engine import PruningEngine, StepResult
from megatron_prune.training.guard import WINDOW, jumped, remembered, spiked
from megatron_prune.training.lr import learning_rate
from megatron_prune.training.removals import Removals
from megatron_prune.training.report import warn
from megatron_prune.training.resume import resumed
from megatron_prune.training.signals import StopRequest


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What a callback is told of a step.

    Attributes:
        result: loss, gradient norm, applied or not.
        lr: learning rate used.
        trained_shape: the model the step's FLOPs were spent on.
        compacted: tensors were physically cut after it.
        deferred: type whose removal was put off for a spike of its saliency, or None.
        jumped: its loss is too far above what is usual, and groups were removed lately.
    """

    result: StepResult
    lr: float
    trained_shape: Architecture
    compacted: bool
    deferred: GroupType | None
    jumped: bool


class Callback(Protocol):
    """Something that happens beside training. Called on every rank, in the order of the list."""

    @property
    def phase(self) -> str:
        """What it does, for users who wonder where a run hangs."""

    def at_start(self, trainer: Trainer) -> None:
        """The run begins or goes on: what a stop left out can be made up for."""

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
        micro_batch_size: samples per forward pass under a placement (``--grow-micro-batch``), or None if it is fixed.

    Attributes:
        removals_left: groups that this step has chosen and not removed yet.
    """

    def __init__(
        self,
        config: Config,
        engine: PruningEngine,
        pruner: Removals | None,
        batches: Batches,
        mesh: Mesh,
        ledger: Ledger,
        progress: Progress,
        callbacks: Sequence[Callback],
        micro_batch_size: Callable[[Partition], int] | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.batches = batches
        self.mesh = mesh
        self.ledger = ledger
        self.progress = progress
        self._pruner = pruner
        self._callbacks = callbacks
        self._micro_batch_size = micro_batch_size
        self._stop = StopRequest(None)
        self._stopped_by: str | None = None
        self._phases = Phases()
        self._deferred: GroupType | None = None
        self._ledger_lacks = False
        self.removals_left = 0

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

    def run(self, stop: StopRequest, phases: Phases | None = None) -> None:
        """Train to ``train_iters``.

        Args:
            stop: polled between steps, and by callbacks that take longer than one.
            phases: told what this process is doing.

        Raises:
            StopRequested: asked to stop; the callbacks have saved everything.
        """
        self._stop, self._phases = stop, phases or self._phases
        samples = self.config.baseline.few_shot_samples
        if samples is not None and self._pruner is not None and self.pruning:
            with self._phase("few-shot pruning"):
                self._prune_at_once(self._pruner, samples)
        for callback in self._callbacks:
            with self._phase(callback.phase):
                callback.at_start(self)
        while self._goes_on():
            with self._phases.inside("training step", self.progress.step + 1):
                record = self._step()
            for callback in self._callbacks:
                with self._phase(callback.phase):
                    callback.after_step(self, record)
            self._check_skips()
        self._finish()
        stop.obeyed()  # also at the end of all steps: the file must not stop a run that is given more of them
        if self._stopped_by is not None:
            raise StopRequested(f"stopped at step {self.progress.step} by {self._stopped_by}; start again to go on")

    def asked_to_stop(self) -> bool:
        """True from the moment that any process has been asked to; a collective.

        After it was True the run ends with :class:`StopRequested`, whatever was left out, even after its last step.
        """
        if self._stopped_by is None and largest(int(self._stop.reason is not None), self.mesh):
            self._stopped_by = from_main(self._stop.reason, self.mesh) or "a signal on another rank"
        return self._stopped_by is not None

    def _goes_on(self) -> bool:
        self._phases.enter("next step", self.progress.step)
        return self.progress.step < self.config.train.train_iters and not self.asked_to_stop()

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return self._phases.inside(name, self.progress.step)

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
            decide = lambda: self._decide(pruner)  # noqa: E731
        self._deferred = None
        result = self.engine.train_step(self.batches.training(progress.consumed_samples), lr, decide)
        jumped = result.applied and self._watch_loss(result.loss)
        self._advance(
            step=progress.step + 1,
            adam_steps=progress.adam_steps + result.applied,
            consumed_samples=progress.consumed_samples + self.config.train.global_batch_size,
            skips_in_a_row=0 if result.applied else progress.skips_in_a_row + 1,
        )
        compacted = False
        if pruner is not None and decide is not None:
            if result.applied:
                self._remove(pruner)
                compacted = self._compact_if_due()
            else:
                pruner.discard()
            self._advance(saliency="" if pruner.met else pruner.memory)
            if pruner.met:
                self._advance(continue_from=self.progress.step)
        return StepRecord(result, lr, shape, compacted, self._deferred, jumped)

    def _remove(self, pruner: Removals) -> None:
        self.removals_left = pruner.chosen
        for decision in pruner.commit():
            self.removals_left -= 1
            self._record(decision)

    def _prune_at_once(self, pruner: Removals, samples: int) -> None:
        """Few-shot pruning: the gradient of the next samples decides everything, and no step is taken.

        The engine was started for this one batch; another takes its place.
        """
        progress = self.progress
        batches = self.batches.calibration(progress.consumed_samples, samples)
        self.engine.calibrate(batches, lambda: self._decide_all(pruner))
        if not pruner.chosen:
            raise MegatronPruneError(
                f"the gradient of the {samples} samples of --few-shot-samples is not finite: look at the data, or give "
                "another --seed"
            )
        self._advance(consumed_samples=progress.consumed_samples + samples)
        self._remove(pruner)
        quantum, partition = self.config.prune.prune_align, self.engine.partition
        self._cut(partition.compacted(quantum) if quantum else partition)
        self._advance(continue_from=progress.step)

    def _decide_all(self, pruner: Removals) -> None:
        pruner.decide(self.progress.step, self.progress.units_spent, lambda decision: False)

    def _decide(self, pruner: Removals) -> None:
        with self._phases.inside("decision", self.progress.step + 1):
            self._deferred = pruner.decide(self.progress.step, self.progress.units_spent, self._doubts)
        if self._deferred is not None:
            self._advance(deferred_at=self.progress.step)

    def _doubts(self, decision: Decision) -> bool:
        """Never twice in a row: a spike that stays is how things are now."""
        if self.progress.step - 1 == self.progress.deferred_at:
            return False
        kind = decision.group.type
        return spiked(kind, decision.scores[kind], self.ledger.events, self.config.guard.saliency_spike)

    def _watch_loss(self, loss: float) -> bool:
        """Whether the loss of a step has jumped, which every rank has the same; remembers it otherwise."""
        nats, recent, events = self.config.guard.rollback_loss_jump, self.progress.recent_losses, self.ledger.events
        if nats is None:
            return False
        if events and self.progress.step - events[-1].step < WINDOW and jumped(loss, recent, nats):
            return True
        self._advance(recent_losses=remembered(loss, recent))
        return False

    def _check_skips(self) -> None:
        if self.progress.skips_in_a_row >= self.config.guard.max_skipped_steps:
            raise MegatronPruneError(
                f"{self.progress.skips_in_a_row} steps in a row had a non-finite gradient, up to step "
                f"{self.progress.step}; the last checkpoint is as it was: look at the data there, lower --lr, or allow "
                "more by --max-skipped-steps"
            )

    def go_back(self, partition: Partition, states: StateSource | SlicedStates, saved: Manifest) -> None:
        """Take up an earlier state of the run, and go on with the samples that come next.

        Those seen since then are not used again: the same samples would lead to the same place.

        Args:
            partition: placement to start in.
            states: where masters and moments come from.
            saved: its manifest; the run may have had another target or pace then.
        """
        pruner = self._pruner
        progress = resumed(self.config, saved, pruner is None or pruner.met_by(saved.partition.architecture()))
        self._follow_size(partition)
        self.engine.restart(partition, states, progress.adam_steps)
        self._write_ledger(lambda: self.ledger.restore(self.ledger.events[: progress.events]))
        seen, rollbacks = self.progress.consumed_samples, self.progress.rollbacks
        self.progress = dataclasses.replace(progress, consumed_samples=seen, rollbacks=rollbacks + 1)
        if pruner is not None:
            pruner.pace_from(max(self.config.prune_start_iter, progress.pace_from), progress.pace_spent)
            pruner.remember(progress.saliency)

    def _record(self, decision: Decision) -> None:
        arch, group = self.architecture, decision.group
        self._advance(
            events=self.progress.events + 1,
            units_spent=self.progress.units_spent + units(group.type, arch, group.size),
        )
        event = Event(
            event=self.progress.events,
            step=self.progress.step,
            tokens=self.tokens,
            type=group.type,
            removed=group.listed(),
            scores={kind: score for kind, score in decision.scores.items()},
            shape=shape_of(arch),
            parameters=arch.num_parameters(),
        )
        if self._ledger_lacks:
            self._write_ledger(lambda: self.ledger.restore([*self.ledger.events, event]))
        else:
            self._write_ledger(lambda: self.ledger.append(event))
        for callback in self._callbacks:
            with self._phase(callback.phase):
                callback.after_removal(self, event)

    def _write_ledger(self, write: Callable[[], None]) -> None:
        """A full disk does not end days of training: checkpoints have the whole ledger, and the file is made up for."""
        try:
            write()
        except OSError as error:
            if not self._ledger_lacks:
                warn(f"the ledger cannot be written ({error.strerror or error}); it is written again with a later one")
            self._ledger_lacks = True
        else:
            self._ledger_lacks = False

    def _compact_if_due(self) -> bool:
        quantum, partition = self.config.prune.prune_align, self.engine.partition
        if not quantum or not partition.compaction_due(quantum):
            return False
        with self._phase("compaction"):
            self._cut(partition.compacted(quantum))
        return True

    def _cut(self, after: Partition) -> None:
        self._follow_size(after)
        self.engine.compact(after, self.progress.adam_steps)

    def _follow_size(self, partition: Partition) -> None:
        """Before an engine starts: as many samples at once as the placement has room for."""
        train = self.config.train
        micro = train.micro_batch_size if self._micro_batch_size is None else self._micro_batch_size(partition)
        self.batches = dataclasses.replace(self.batches, micro_batch_size=micro)
        self.engine.set_batch(micro, self.batches.per_copy)

    def mark_exported(self, name: str) -> None:
        """Remember that a budget's snapshot is written."""
        self._advance(exported=(*self.progress.exported, name))

    def _advance(self, **changes: Any) -> None:
        self.progress = dataclasses.replace(self.progress, **changes)

    def _finish(self) -> None:
        if self._ledger_lacks:
            self._write_ledger(lambda: self.ledger.restore(self.ledger.events))
        for callback in self._callbacks:
            with self._phase(callback.phase):
                callback.at_end(self)
