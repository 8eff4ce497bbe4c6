"""What happens beside training: metrics, validation, exports, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megatron_prune.architecture import tensor_specs
from megatron_prune.checkpoint.hf import export_verified
from megatron_prune.checkpoint.manifest import Manifest, Progress
from megatron_prune.checkpoint.store import (
    SOURCE_DIR,
    BackgroundSave,
    DamagedCheckpoint,
    HostMemory,
    SaveError,
    open_newest,
    save_checkpoint,
)
from megatron_prune.config.schema import TARGET_MARK
from megatron_prune.config.values import parse_count
from megatron_prune.errors import MegatronPruneError
from megatron_prune.parallel.collectives import barrier, from_main
from megatron_prune.parallel.states import SlicedStates
from megatron_prune.pruning.ledger import Event, shape_of
from megatron_prune.training.console import Status
from megatron_prune.training.inputs import placement
from megatron_prune.training.loop import StepRecord, Trainer
from megatron_prune.training.report import METRICS_FILE, Reporter, read_jsonl
from megatron_prune.training.resume import newest_whole, put_aside
from megatron_prune.training.speed import Eta, Throughput

MAX_SHARD_BYTES = 5 * 10**9
MAX_ROLLBACKS = 3


def report_damaged(reporter: Reporter, damaged: Sequence[DamagedCheckpoint], step: int) -> None:
    """Say which checkpoints were passed over, newest last, to go on from ``step``."""
    for damage in reversed(damaged):
        what = {"file": str(damage.directory / damage.file), "why": damage.why}
        reporter.event({"event": "went back past a damaged checkpoint", "step": step, **what})


class _Callback:
    """Does nothing at any moment; callbacks override what they need."""

    phase = "report"

    def at_start(self, trainer: Trainer) -> None:
        """See :class:`~megatron_prune.training.loop.Callback`."""

    def after_removal(self, trainer: Trainer, event: Event) -> None:
        """See :class:`~megatron_prune.training.loop.Callback`."""

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """See :class:`~megatron_prune.training.loop.Callback`."""

    def at_end(self, trainer: Trainer) -> None:
        """See :class:`~megatron_prune.training.loop.Callback`."""


class Metrics(_Callback):
    """Logs every ``log_interval`` steps, removals and compactions.

    Args:
        reporter: where lines go.
        throughput: meter.
        target_parameters: of the budget, for the progress shown.
    """

    def __init__(self, reporter: Reporter, throughput: Throughput, target_parameters: int | None) -> None:
        self._reporter = reporter
        self._throughput = throughput
        self._target = target_parameters
        self._eta = Eta()
        self._scores: Mapping[str, float] | None = None

    def at_start(self, trainer: Trainer) -> None:
        """Take up the scores of the last removal before a stop."""
        if trainer.ledger.events:
            self._scores = trainer.ledger.events[-1].scores

    def after_removal(self, trainer: Trainer, event: Event) -> None:
        """Count the removal and keep its scores for the next line."""
        self._scores = event.scores
        self._reporter.event({"event": "removal", "step": event.step, "type": event.type})

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Log the interval that ends with this step."""
        progress, config = trainer.progress, trainer.config
        self._throughput.add(config.batch_tokens, record.trained_shape)
        self._eta.update(progress.step)
        if record.compacted:
            grown = {"micro_batch_size": trainer.batches.micro_batch_size} if config.train.grow_micro_batch else {}
            shape = shape_of(trainer.architecture)
            self._reporter.event({"event": "compaction", "step": progress.step, **shape, **grown})
        if not record.result.applied:
            reason = "non-finite gradient, step skipped, nothing decided"
            self._reporter.event({"event": "skip", "step": progress.step, "reason": reason})
        if record.deferred is not None:
            reason = f"the saliency of {record.deferred} is far above its median"
            self._reporter.event({"event": "removal put off", "step": progress.step, "reason": reason})
        last = progress.step == config.train.train_iters
        if progress.step % config.run.log_interval and not last:
            return
        speed, arch = self._throughput.read(), trainer.architecture
        line: dict[str, Any] = {
            "step": progress.step,
            "tokens": trainer.tokens,
            "loss": record.result.loss,
            "grad_norm": record.result.grad_norm,
            "lr": record.lr,
            "tokens_per_second": speed.tokens_per_second,
            "mfu": speed.mfu,
            "memory_bytes": _peak_memory(trainer.mesh.device),
            "parameters": arch.num_parameters(),
            **shape_of(arch),
            "scores": self._scores,
            "skipped": progress.skipped,
        }
        status = Status(
            source_parameters=trainer.engine.partition.source.num_parameters(),
            target_parameters=self._target,
            eta_seconds=self._eta.seconds(config.train.train_iters - progress.step),
        )
        self._reporter.log(line, status)


def _peak_memory(device: torch.device) -> int | None:
    """The most that tensors of this process took on its GPU since the last call, in bytes; None without a GPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


class Validation(_Callback):
    """Mean loss over the validation part every ``eval_interval`` steps, when the budget is met, and at the end.

    Args:
        reporter: where lines go.
        throughput: meter to pause.
    """

    phase = "validation"

    def __init__(self, reporter: Reporter, throughput: Throughput) -> None:
        self._reporter = reporter
        self._throughput = throughput

    def at_start(self, trainer: Trainer) -> None:
        """Validate if that is due and the run directory has no line of it: a stop left it out."""
        begun = trainer.progress.step or trainer.progress.events  # few-shot pruning comes before the first step
        if begun and self._due(trainer) and not from_main(self._is_done(trainer), trainer.mesh):
            self._validate(trainer)

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Validate when due."""
        if self._due(trainer):
            self._validate(trainer)

    def _due(self, trainer: Trainer) -> bool:
        step, config = trainer.progress.step, trainer.config
        due = step % config.run.eval_interval == 0
        return due or step in (trainer.progress.continue_from, config.train.train_iters)

    def _is_done(self, trainer: Trainer) -> bool:
        """On the main process, the only one that can be sure to see the file as it is."""
        directory, step = trainer.config.run.directory, trainer.progress.step
        if not trainer.mesh.is_main or directory is None or not (path := Path(directory) / METRICS_FILE).exists():
            return False
        return any(line["step"] == step and "val_loss" in line for line in read_jsonl(path))

    def _validate(self, trainer: Trainer) -> None:
        """One global batch at a time; a stop between two of them leaves the validation to the resumed run."""
        global_batches = trainer.config.run.eval_iters
        batches, count = trainer.batches.validation(global_batches)
        losses = []
        with self._throughput.paused():
            for _ in range(global_batches):
                if trainer.asked_to_stop():
                    return
                losses.append(trainer.engine.evaluate(batches, count // global_batches))
        loss = sum(losses) / len(losses)
        self._reporter.log({"step": trainer.progress.step, "tokens": trainer.tokens, "val_loss": loss})


class Exports(_Callback):
    """Writes a Hugging Face snapshot at the first shape at or under each ``--export-at`` budget, and at the target.

    Args:
        reporter: where lines go.
        throughput: meter to pause.
        run_dir: snapshots go to ``exports/NAME``, tokenizer and config come from ``source``.
        source_config: the source's ``config.json``.
    """

    phase = "export"

    def __init__(
        self, reporter: Reporter, throughput: Throughput, run_dir: Path, source_config: Mapping[str, Any]
    ) -> None:
        self._reporter = reporter
        self._throughput = throughput
        self._run_dir = run_dir
        self._source_config = source_config

    def at_start(self, trainer: Trainer) -> None:
        """Write what a stop left out."""
        if trainer.progress.events:
            self._export_due(trainer)

    def after_removal(self, trainer: Trainer, event: Event) -> None:
        """Export the budgets this removal crossed."""
        self._export_due(trainer)

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Export the target once pruning has ended."""
        if TARGET_MARK in trainer.config.prune.export_at and trainer.progress.continue_from is not None:
            self._export_due(trainer)

    def _export_due(self, trainer: Trainer) -> None:
        for name in trainer.config.prune.export_at:
            if name in trainer.progress.exported or not self._reached(trainer, name):
                continue
            # The checkpoint will hold this very shape, unless the step goes on to remove more.
            if not trainer.removals_left and trainer.asked_to_stop():
                return
            with self._throughput.paused():
                self._export(trainer, name)
            trainer.mark_exported(name)

    def _reached(self, trainer: Trainer, name: str) -> bool:
        if name == TARGET_MARK:
            return trainer.progress.continue_from is not None
        return trainer.architecture.num_parameters() <= parse_count(name)

    def _export(self, trainer: Trainer, name: str) -> None:
        partition = trainer.engine.partition
        tensors = {}
        for spec in tensor_specs(partition.source):  # a collective: every rank asks, the main one keeps
            whole = trainer.engine.master_on_main(spec)
            if trainer.mesh.is_main:
                tensors[spec.name] = whole.cpu()
        if trainer.mesh.is_main:
            self._reporter.event({"step": trainer.progress.step, **self._write(trainer, name, tensors)})
        barrier(trainer.mesh)

    def _write(self, trainer: Trainer, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Export on the main process; a snapshot that fails its check is reported and does not end days of training."""
        directory, arch = self._run_dir / "exports" / name, trainer.architecture
        try:
            _, verified = export_verified(
                directory,
                arch,
                tensors,
                dtype=torch.bfloat16 if trainer.config.train.precision == "bf16" else torch.float32,
                tokenizer_dir=self._run_dir / SOURCE_DIR,
                source_config=self._source_config,
                max_shard_bytes=MAX_SHARD_BYTES,
            )
        except MegatronPruneError as error:
            return {"event": "export failed its check", "why": str(error)}
        except (OSError, SafetensorError) as error:
            return {"event": "export could not be written", "to": str(directory), "why": str(error)}
        difference = f"logits within {verified.max_abs_logit_difference:.1e} of transformers'"
        return {"event": "export", "parameters": arch.num_parameters(), "to": str(directory), "verified": difference}


class Checkpoints(_Callback):
    """Saves every ``save_interval`` steps and whenever the run stops.

    Under ``--async-save`` a checkpoint is written behind the steps that follow, one at a time: the next one waits for
    it, and so does the end. One that cannot be written is reported, and ends the run only if ``--on-save-failure stop``
    says so or the run ends there anyway.

    Args:
        reporter: where lines go.
        throughput: meter to pause.
        run_dir: checkpoints go to ``checkpoints``.
        saved: what the newest checkpoint there holds, or None.
    """

    phase = "saving a checkpoint"

    def __init__(self, reporter: Reporter, throughput: Throughput, run_dir: Path, saved: Progress | None) -> None:
        self._reporter = reporter
        self._throughput = throughput
        self._run_dir = run_dir
        self._saved = saved
        self._pending: BackgroundSave | None = None
        self._deleting: threading.Thread | None = None
        self._memory = HostMemory()

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Save when due, and complete what was written in the meantime."""
        if record.jumped and self._went_back(trainer, record.result.loss):
            return
        run, step = trainer.config.run, trainer.progress.step
        may_fail = run.on_save_failure == "continue"
        due = bool(run.save_interval) and step % run.save_interval == 0
        if self._pending is not None and (due or self._pending.written()):
            self._complete(trainer, may_fail)
        if due:
            self._save(trainer, run.async_save, may_fail)

    def at_end(self, trainer: Trainer) -> None:
        """Wait for a checkpoint that is being written; save unless this very state was saved already."""
        if self._pending is not None:
            self._complete(trainer, may_fail=True)  # if it fails, there is no checkpoint of this state yet
        if self._saved != trainer.progress:
            self._save(trainer, in_background=False, may_fail=False)
        if self._deleting is not None:
            self._deleting.join()

    def _went_back(self, trainer: Trainer, loss: float) -> bool:
        """Go back to the newest whole checkpoint, if there is one."""
        step = trainer.progress.step
        if self._pending is not None:
            self._complete(trainer, may_fail=True)
        if trainer.progress.rollbacks == MAX_ROLLBACKS:
            raise MegatronPruneError(
                f"the loss jumped to {loss:.3f} at step {step}, after {MAX_ROLLBACKS} returns to a checkpoint for the "
                "same reason; prune more slowly (--prune-ratio), lower --lr, or raise --rollback-loss-jump"
            )
        found = newest_whole(open_newest(self._run_dir), trainer.mesh)
        if found is None:
            self._reporter.event({"event": "the loss jumped", "step": step, "loss": loss, "checkpoint": "none yet"})
            return False
        put_aside(found.damaged, trainer.mesh)
        report_damaged(self._reporter, found.damaged, found.checkpoint.manifest.progress.step)
        saved = found.checkpoint.manifest
        with self._throughput.paused():
            states = SlicedStates(found.checkpoint.fragment)
            trainer.go_back(placement(saved.partition, trainer.config), states, saved)
        self._saved = saved.progress
        self._reporter.event({"event": "the loss jumped", "step": step, "loss": loss, "back to": saved.progress.step})
        self._reporter.rewind(saved.progress.step)
        return True

    def _save(self, trainer: Trainer, in_background: bool, may_fail: bool) -> None:
        manifest = Manifest(
            partition=trainer.engine.partition,
            progress=trainer.progress,
            settings=dataclasses.asdict(trainer.config),
            data_fingerprint=trainer.batches.train.fingerprint(),
            shards={},
        )
        events, fragments = trainer.ledger.events, trainer.engine.state_fragments()
        arguments = (self._run_dir, manifest, events, fragments, trainer.mesh, trainer.config.run.keep_last)
        with self._throughput.paused(), self._reported(trainer, may_fail):
            if in_background:
                self._pending = BackgroundSave(*arguments, self._memory)
            else:
                self._report(trainer, save_checkpoint(*arguments), trainer.progress)

    def _complete(self, trainer: Trainer, may_fail: bool) -> None:
        pending, self._pending = self._pending, None
        assert pending is not None
        with self._throughput.paused(), self._reported(trainer, may_fail):
            path = pending.finish()
            self._deleting = pending.deleting
            self._report(trainer, path, pending.progress)

    def _report(self, trainer: Trainer, path: Path, progress: Progress) -> None:
        self._saved = progress
        self._reporter.event({"event": "checkpoint", "step": trainer.progress.step, "to": str(path)})

    @contextlib.contextmanager
    def _reported(self, trainer: Trainer, may_fail: bool) -> Iterator[None]:
        try:
            yield
        except SaveError as error:  # every rank has the same
            if not may_fail:
                raise
            self._reporter.event({"event": "no checkpoint", "step": trainer.progress.step, "why": str(error)})
