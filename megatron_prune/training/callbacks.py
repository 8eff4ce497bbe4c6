"""What happens beside training: metrics, validation, exports, checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prune.architecture import tensor_specs
from megatron_prune.checkpoint.hf import export_verified
from megatron_prune.checkpoint.manifest import Manifest
from megatron_prune.checkpoint.store import SOURCE_DIR, save_checkpoint
from megatron_prune.config.values import parse_count
from megatron_prune.errors import MegatronPruneError
from megatron_prune.parallel.collectives import barrier
from megatron_prune.pruning.ledger import Event, shape_of
from megatron_prune.training.console import Status
from megatron_prune.training.loop import StepRecord, Trainer
from megatron_prune.training.report import Reporter
from megatron_prune.training.speed import Eta, Throughput

MAX_SHARD_BYTES = 5 * 10**9


class _Callback:
    """Does nothing at any moment; callbacks override what they need."""

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
            self._reporter.event({"event": "compaction", "step": progress.step, **shape_of(trainer.architecture)})
        if not record.result.applied:
            reason = "non-finite gradient, step skipped, nothing decided"
            self._reporter.event({"event": "skip", "step": progress.step, "reason": reason})
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


class Validation(_Callback):
    """Mean loss over the validation part every ``eval_interval`` steps, when the budget is met, and at the end.

    Args:
        reporter: where lines go.
        throughput: meter to pause.
    """

    def __init__(self, reporter: Reporter, throughput: Throughput) -> None:
        self._reporter = reporter
        self._throughput = throughput

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Validate when due."""
        step, config = trainer.progress.step, trainer.config
        due = step % config.run.eval_interval == 0
        if not (due or step in (trainer.progress.continue_from, config.train.train_iters)):
            return
        batches, count = trainer.batches.validation(config.run.eval_iters)
        with self._throughput.paused():
            loss = trainer.engine.evaluate(batches, count)
        self._reporter.log({"step": step, "tokens": trainer.tokens, "val_loss": loss})


class Exports(_Callback):
    """Writes a Hugging Face snapshot at the first shape at or under each ``--export-at`` budget.

    Args:
        reporter: where lines go.
        throughput: meter to pause.
        run_dir: snapshots go to ``exports/NAME``, tokenizer and config come from ``source``.
        source_config: the source's ``config.json``.
    """

    def __init__(
        self, reporter: Reporter, throughput: Throughput, run_dir: Path, source_config: Mapping[str, Any]
    ) -> None:
        self._reporter = reporter
        self._throughput = throughput
        self._run_dir = run_dir
        self._source_config = source_config

    def after_removal(self, trainer: Trainer, event: Event) -> None:
        """Export the budgets this removal crossed."""
        for name in trainer.config.prune.export_at:
            if name not in trainer.progress.exported and event.parameters <= parse_count(name):
                with self._throughput.paused():
                    self._export(trainer, name)
                trainer.mark_exported(name)

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
        difference = f"logits within {verified.max_abs_logit_difference:.1e} of transformers'"
        return {"event": "export", "parameters": arch.num_parameters(), "to": str(directory), "verified": difference}


class Checkpoints(_Callback):
    """Saves every ``save_interval`` steps and whenever the run stops.

    Args:
        reporter: where lines go.
        throughput: meter to pause.
        run_dir: checkpoints go to ``checkpoints``.
        saved: the step whose checkpoint is there already, or None.
    """

    def __init__(self, reporter: Reporter, throughput: Throughput, run_dir: Path, saved: int | None) -> None:
        self._reporter = reporter
        self._throughput = throughput
        self._run_dir = run_dir
        self._saved = saved

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Save when due."""
        interval = trainer.config.run.save_interval
        if interval and trainer.progress.step % interval == 0:
            self._save(trainer)

    def at_end(self, trainer: Trainer) -> None:
        """Save unless this very step was saved already."""
        if self._saved != trainer.progress.step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        manifest = Manifest(
            partition=trainer.engine.partition,
            progress=trainer.progress,
            settings=dataclasses.asdict(trainer.config),
            data_fingerprint=trainer.batches.train.fingerprint(),
            shards={},
        )
        with self._throughput.paused():
            path = save_checkpoint(
                self._run_dir,
                manifest,
                trainer.ledger.events,
                trainer.engine.state_fragments(),
                trainer.mesh,
                trainer.config.run.keep_last,
            )
        self._saved = trainer.progress.step
        self._reporter.event({"event": "checkpoint", "step": trainer.progress.step, "to": str(path)})
