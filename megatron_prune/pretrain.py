"""``main`` of ``pretrain_prune.py``: check everything, then train."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from megatron_prune.config import Config, load_config, validate_against_source, validate_config
from megatron_prune.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILURE,
    EXIT_REQUEUE,
    ConfigError,
    MegatronPruneError,
    StopRequested,
    UserError,
)
from megatron_prune.ops.dispatch import format_choices
from megatron_prune.parallel.mesh import init_process_group, map_launcher_environment
from megatron_prune.parallel.watch import watch_peers
from megatron_prune.plan import format_plan, make_plan
from megatron_prune.training.inputs import Inputs, read_inputs, read_source
from megatron_prune.training.report import Reporter
from megatron_prune.training.signals import STOP_SIGNALS, StopRequest


def main(argv: Sequence[str] | None = None) -> int:
    """Run a training command.

    Args:
        argv: flags without the program's name; the process's own by default, which then ends with what is returned.

    Returns:
        The exit code: 0 finished, 2 bad input, 75 stopped with a complete checkpoint.
    """
    try:
        _run(sys.argv[1:] if argv is None else argv)
    except StopRequested as stop:
        _say(str(stop), sys.stderr)
        if argv is None:
            # Launchers terminate the other ranks once one has left, and would report a signal instead of this code.
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        return EXIT_REQUEUE
    except UserError as error:
        _complain(error)
        return EXIT_BAD_INPUT
    except MegatronPruneError as error:
        _complain(error)
        return EXIT_FAILURE
    return 0


def _run(argv: Sequence[str]) -> None:
    config = load_config(argv)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn that it found none
    map_launcher_environment(os.environ)
    world_size = int(os.environ["WORLD_SIZE"])
    validate_config(config, world_size)
    source_path, source = read_source(config)
    validate_against_source(config, source)
    inputs = read_inputs(config, source_path, source)
    if config.run.dry_run:
        _say(format_plan(make_plan(config, source, num_gpus=world_size)))
        return
    with StopRequest(config.run.exit_duration_in_mins) as stop:
        device = init_process_group()
        try:
            with watch_peers():
                _train(config, inputs, device, stop)
        finally:
            torch.distributed.destroy_process_group()


def _train(config: Config, inputs: Inputs, device: torch.device, stop: StopRequest) -> None:
    from megatron_prune.training.setup import build_trainer  # imports DeepSpeed: seconds that --help need not wait for

    save_dir = None if config.run.directory is None else Path(config.run.directory)
    is_main = torch.distributed.get_rank() == 0
    _say(format_choices(inputs.ops))
    if config.parallel.sequence_parallel and config.parallel.tensor_model_parallel_size == 1:
        _say("note: --sequence-parallel has no effect at --tensor-model-parallel-size 1")
    forced_loss = any(choice.startswith("cross_entropy=") for choice in config.train.op_impl)
    if forced_loss and config.parallel.tensor_model_parallel_size > 1:
        _say("note: --op-impl cross_entropy has no effect under tensor parallel: the vocabulary is split, its loss too")
    _say(_beginning(config, inputs))
    with Reporter(save_dir, config, is_main, config.train.train_iters) as reporter:
        trainer = build_trainer(config, inputs, device, reporter)
        trainer.run(stop)
    if trainer.pruning:
        parameters = trainer.architecture.num_parameters()
        _say(f"warning: --train-iters ended with {parameters:,} parameters, above the target; raise it and start again")


def _beginning(config: Config, inputs: Inputs) -> str:
    if inputs.checkpoint is not None:
        progress = inputs.checkpoint.manifest.progress
        line = (
            f"resuming {inputs.checkpoint.path} at step {progress.step}: {progress.consumed_samples} samples consumed, "
            f"{progress.events} removals"
        )
        if inputs.checkpoint.manifest.data_fingerprint != inputs.train.fingerprint():
            line += "\nwarning: the data, its blend, split or seed changed since; the samples from here on differ"
        return line
    start = "random weights" if inputs.weights is None else "its weights"
    parameters = inputs.source.num_parameters()
    data = inputs.train.fingerprint()
    return f"starting from {config.model.source} ({parameters:,} parameters, {start}), data {data}"


def _complain(error: MegatronPruneError) -> None:
    """Print an error on every process: only one node may lack a file, and only one rank may meet a bad sample.

    Settings that are wrong are wrong on every process of a node: one of them says so.
    """
    rank = os.environ.get("RANK", "0")
    if isinstance(error, ConfigError) and os.environ.get("LOCAL_RANK", "0") != "0":
        return
    print(f"error: {error}" if rank == "0" else f"error: rank {rank}: {error}", file=sys.stderr, flush=True)


def _say(text: str, file: TextIO | None = None) -> None:
    """Print on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=file or sys.stdout, flush=True)
