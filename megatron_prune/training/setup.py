"""From a checked Config and its inputs to a Trainer: everything that needs process groups."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_prune.architecture import Architecture, TensorSpec
from megatron_prune.checkpoint.hf import (
    copy_companions,
    read_config,
)
from megatron_prune.checkpoint.manifest import Progress
from megatron_prune.checkpoint.store import LEDGER_FILE, SOURCE_DIR
from megatron_prune.config import (
    Config,
    deepspeed_config,
    dump_yaml,
    floor_shape,
    parse_count,
    parse_ratio,
    parse_shape,
)
from megatron_prune.model.pipeline import build_pipeline
from megatron_prune.model.transformer import initial_tensor
from megatron_prune.ops.saliency import Saliency
from megatron_prune.parallel.collectives import agreed
from megatron_prune.parallel.mesh import Mesh, make_mesh
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.states import SlicedStates, StateKind, StateSource
from megatron_prune.pruning.groups import GROUP_TYPES, GroupType
from megatron_prune.pruning.ledger import Ledger
from megatron_prune.pruning.planner import Budget
from megatron_prune.pruning.schedule import Schedule
from megatron_prune.training.batches import Batches
from megatron_prune.training.callbacks import Checkpoints, Exports, Metrics, Validation, report_damaged
from megatron_prune.training.engine import AdamSettings, PruningEngine, prepare_deepspeed
from megatron_prune.training.inputs import Inputs, is_own, placement, verified
from megatron_prune.training.loop import Callback, Trainer
from megatron_prune.training.pruner import Pruner, PruneRules
from megatron_prune.training.report import Reporter
from megatron_prune.training.resume import put_aside, resumed
from megatron_prune.training.run_dir import replace_text, writing
from megatron_prune.training.speed import Throughput, peak_flops


def build_trainer(config: Config, inputs: Inputs, device: torch.device, reporter: Reporter) -> Trainer:
    """Build the model, its engine, the data order and the callbacks. Needs a process group.

    Args:
        config: checked settings.
        inputs: what was read.
        device: of this process.
        reporter: where lines go.
    """
    prepare_deepspeed()
    world_size = torch.distributed.get_world_size()
    parallel = config.parallel
    mesh = make_mesh(device, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    inputs = verified(config, inputs, mesh)
    checkpoint = inputs.checkpoint
    partition = _partition(config, inputs)
    budget = _budget(config, inputs.source)
    met = budget is None or budget.met(partition.architecture())
    progress = resumed(config, checkpoint.manifest, met) if checkpoint else Progress()
    # Ranks that read different directories (a --save that is not shared) would build different models.
    agreed(f"resume {progress.step} events {progress.events}", mesh)
    if checkpoint is not None and is_own(checkpoint, config):
        put_aside(inputs.damaged, mesh)
    sequence_parallel = parallel.sequence_parallel and mesh.tp_size > 1
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its layer table
        pipeline = build_pipeline(
            partition,
            inputs.ops,
            mesh,
            sequence_parallel=sequence_parallel,
            recompute=config.train.recompute,
            compile_layers=config.train.compile,
        )
    optim = config.optim
    engine = PruningEngine(
        pipeline,
        partition,
        deepspeed_config(config, world_size),
        AdamSettings(inputs.ops.adam, (optim.adam_beta1, optim.adam_beta2), optim.adam_eps, optim.weight_decay),
        mesh,
        torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
        sequence_parallel,
    )
    engine.start(partition, _states(config, inputs), progress.adam_steps)
    run_dir = None if config.run.directory is None else Path(config.run.directory)
    ledger = Ledger(run_dir / LEDGER_FILE if run_dir is not None and mesh.is_main else None)
    with contextlib.nullcontext() if run_dir is None else writing(run_dir):
        if run_dir is not None and mesh.is_main:
            _prepare_run_dir(run_dir, config, inputs)
        ledger.restore(checkpoint.events if checkpoint else [])
        reporter.truncate_after(progress.step)
    report_damaged(reporter, inputs.damaged, progress.step)
    return Trainer(
        config,
        engine,
        None if budget is None else _pruner(config, budget, progress, engine, inputs.ops.saliency, mesh),
        Batches(inputs.train, inputs.valid, config.train.micro_batch_size, config.train.global_batch_size, mesh),
        mesh,
        ledger,
        progress,
        _callbacks(config, inputs, mesh, reporter, run_dir),
    )


def _partition(config: Config, inputs: Inputs) -> Partition:
    if inputs.checkpoint is None:
        return Partition.of(inputs.source, config.parallel.tensor_model_parallel_size)
    return placement(inputs.checkpoint.manifest.partition, config)


def _budget(config: Config, source: Architecture) -> Budget | None:
    prune = config.prune
    if not prune.active:
        return None
    hidden, ffn, heads = floor_shape(prune, source)
    shape: dict[GroupType, int] | None = None
    if prune.target_shape is not None:
        goal = parse_shape(prune.target_shape).resolve(source)
        shape = {"stem": goal[0], "ffn": goal[1], "attention": goal[2]}
    return Budget(
        target_params=None if prune.target_params is None else parse_count(prune.target_params),
        target_shape=shape,
        floors={"attention": heads, "ffn": ffn, "stem": hidden},
        axes=[kind for kind in GROUP_TYPES if kind in prune.prune_axes],
    )


def _pruner(
    config: Config, budget: Budget, progress: Progress, engine: PruningEngine, kernels: Saliency, mesh: Mesh
) -> Pruner:
    prune = config.prune
    pruning, gradient = parse_ratio(prune.prune_ratio)
    start = max(config.prune_start_iter, progress.pace_from)
    schedule = Schedule(pruning, gradient, start, progress.pace_spent)
    assert prune.prune_metric != "param_first", "the schema turns the alias into taylor"
    rules = PruneRules(budget, schedule, prune.prune_metric, prune.saliency_norm, config.train.seed, kernels)
    return Pruner(engine, mesh, rules)


def _callbacks(config: Config, inputs: Inputs, mesh: Mesh, reporter: Reporter, run_dir: Path | None) -> list[Callback]:
    on_gpu = mesh.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
    throughput = Throughput(config.data.seq_length, mesh.world_size, peak)
    target = None if config.prune.target_params is None else parse_count(config.prune.target_params)
    callbacks: list[Callback] = [Metrics(reporter, throughput, target)]
    if inputs.valid is not None:
        callbacks.append(Validation(reporter, throughput))
    if run_dir is not None:
        callbacks.append(Exports(reporter, throughput, run_dir, _source_config(inputs)))
        saved = inputs.checkpoint
        own = None if saved is None or not is_own(saved, config) else saved.manifest.progress
        callbacks.append(Checkpoints(reporter, throughput, run_dir, own))
    return callbacks


def _states(config: Config, inputs: Inputs) -> StateSource | SlicedStates:
    weights, saved = inputs.weights, inputs.checkpoint or inputs.base
    if saved is not None:
        return SlicedStates(saved.fragment)

    def from_source(spec: TensorSpec, kind: StateKind) -> torch.Tensor:
        assert kind == "master", "a source has no moments"
        if weights is None:
            shape = inputs.source.tensor_shape(spec)
            return initial_tensor(spec.name, shape, config.train.seed, inputs.source.num_layers)
        return weights.tensor(spec.name).float()

    return from_source


def _source_config(inputs: Inputs) -> Mapping[str, Any]:
    return read_config(inputs.source_path)


def _prepare_run_dir(run_dir: Path, config: Config, inputs: Inputs) -> None:
    """Write the resolved settings and keep what exports need of the source, so that the run stands alone."""
    kept = run_dir / SOURCE_DIR
    kept.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir / "config.yaml", dump_yaml(config))
    replace_text(kept / "config.json", _config_text(inputs.source_path))
    home = inputs.source_path if inputs.source_path.is_dir() else inputs.source_path.parent
    copy_companions(home, kept, config.model.tokenizer)


def _config_text(source_path: Path) -> str:
    return (source_path / "config.json" if source_path.is_dir() else source_path).read_text()
