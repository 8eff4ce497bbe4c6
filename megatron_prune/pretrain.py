"""``main`` of ``pretrain_prune.py``: check everything, then train."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from megatron_prune.checkpoint.store import damaged_directories
from megatron_prune.config import Config, load_config, validate_against_source, validate_config
from megatron_prune.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILURE,
    EXIT_REQUEUE,
    ConfigError,
    MegatronPruneError,
    PeersMissingError,
    StopRequested,
    UserError,
)
from megatron_prune.growth import micro_batch_rule
from megatron_prune.ops.dispatch import format_choices
from megatron_prune.parallel.join import joined
from megatron_prune.parallel.mesh import init_process_group, map_launcher_environment
from megatron_prune.parallel.phases import Phases
from megatron_prune.parallel.watch import watch_peers
from megatron_prune.plan import format_plan, make_plan
from megatron_prune.training.inputs import Inputs, read_inputs, read_source
from megatron_prune.training.report import Reporter
from megatron_prune.training.run_dir import locked
from megatron_prune.training.signals import STOP_FILE, StopRequest

#: For which a process keeps quiet about what another one of its node says: launchers end all once the first has left.
QUIET_SECONDS = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a training command.

    Args:
        argv: flags without the program's name; the process's own by default, which then ends with what is returned.

    Returns:
        The exit code: 0 finished, 2 bad input, 75 stopped with a complete checkpoint.
    """
    try:
        if argv is None:
            _run(sys.argv[1:], is_last=True)
        else:
            _run(argv, is_last=False)
    except StopRequested as stop:
        _say(str(stop), sys.stderr)
        return EXIT_REQUEUE
    except UserError as error:
        _complain(error)
        return EXIT_BAD_INPUT
    except MegatronPruneError as error:
        _complain(error)
        return EXIT_FAILURE
    return 0


def _run(argv: Sequence[str], is_last: bool) -> None:
    """Run a command; ``is_last``: the process does nothing after it."""
    note = map_launcher_environment(os.environ)  # first: even a mistake in a flag is said once per node
    config = _read_settings(argv)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn that it found none
    world_size = int(os.environ["WORLD_SIZE"])
    validate_config(config, world_size)
    source_path, source = read_source(config)
    validate_against_source(config, source)
    inputs = read_inputs(config, source_path, source)
    if config.run.dry_run:
        if inputs.checkpoint is not None:
            from megatron_prune.training.setup import check_start  # imports DeepSpeed, as below

            check_start(config, inputs)
        _say(format_plan(make_plan(config, source, num_gpus=world_size)))
        return
    if note is not None:
        _say(note)
    stop, phases = _stop_request(config, is_last), Phases()
    # Signals are remembered only once there is a loop that looks: before, they end a process that waits for others.
    with joined() as meeting, watch_peers(meeting, phases), locked(_main_s_directory(config)):
        device = init_process_group(meeting)
        with stop:
            _train(config, inputs, device, stop, phases)


def _read_settings(argv: Sequence[str]) -> Config:
    try:
        return load_config(argv)
    except ConfigError:
        raise
    except UserError as error:  # every process is given the same flags
        raise ConfigError([str(error)]) from error


def _stop_request(config: Config, is_last: bool) -> StopRequest:
    directory = _main_s_directory(config)
    file = None if directory is None else directory / STOP_FILE
    return StopRequest(config.run.exit_duration_in_mins, file, is_last=is_last)


def _main_s_directory(config: Config) -> Path | None:
    """The run directory, on the process that looks after it."""
    directory = config.run.directory
    return Path(directory) if directory is not None and os.environ["RANK"] == "0" else None


def _train(config: Config, inputs: Inputs, device: torch.device, stop: StopRequest, phases: Phases) -> None:
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
    damaged = [] if save_dir is None else damaged_directories(save_dir)
    if damaged:
        _say(f"note: damaged checkpoints were put aside earlier and take room: {', '.join(map(str, damaged))}")
    with Reporter(save_dir, config, is_main, config.train.train_iters) as reporter:
        rule = micro_batch_rule(config, inputs.source, torch.distributed.get_world_size())
        trainer = build_trainer(config, inputs, device, reporter, rule)
        trainer.run(stop, phases)
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
    parameters = inputs.source.num_parameters()
    if inputs.base is not None:
        data = inputs.train.fingerprint()
        return f"starting from the weights of {inputs.base.path} ({parameters:,} parameters), data {data}"
    start = "random weights" if inputs.weights is None else "its weights"
    data = inputs.train.fingerprint()
    return f"starting from {config.model.source} ({parameters:,} parameters, {start}), data {data}"


def _complain(error: MegatronPruneError) -> None:
    """Print an error on every process: only one node may lack a file, and only one rank may meet a bad sample.

    Settings that are wrong are wrong on every process of a node: one of them says so. So with ranks that are missing.
    """
    rank = os.environ.get("RANK", "0")
    if isinstance(error, ConfigError | PeersMissingError) and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(QUIET_SECONDS)
        return
    print(f"error: {error}" if rank == "0" else f"error: rank {rank}: {error}", file=sys.stderr, flush=True)


def _say(text: str, file: TextIO | None = None) -> None:
    """Print on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=file or sys.stdout, flush=True)
