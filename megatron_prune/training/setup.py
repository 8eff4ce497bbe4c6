"""From a checked Config and its inputs to a Trainer: everything that needs process groups."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

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
    parse_count,
    parse_ratio,
    parse_shape,
)
from megatron_prune.errors import UserError
from megatron_prune.model.pipeline import build_pipeline
from megatron_prune.model.transformer import initial_tensor
from megatron_prune.ops.saliency import Saliency
from megatron_prune.parallel.collectives import agreed
from megatron_prune.parallel.mesh import Mesh, make_mesh
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.states import SlicedStates, StateKind, StateSource
from megatron_prune.pruning.groups import GROUP_TYPES, GroupType, units
from megatron_prune.pruning.ledger import Ledger
from megatron_prune.pruning.masks import MaskLearner
from megatron_prune.pruning.metrics import Metric
from megatron_prune.pruning.planner import Budget
from megatron_prune.pruning.replay import Replay
from megatron_prune.pruning.schedule import Schedule
from megatron_prune.training.batches import Batches
from megatron_prune.training.callbacks import Checkpoints, Exports, Metrics, Validation, report_damaged
from megatron_prune.training.distill import Teacher
from megatron_prune.training.engine import PruningEngine, prepare_deepspeed
from megatron_prune.training.inputs import BASE_FILE, Inputs, base_digest, is_own, placement, run_of, verified
from megatron_prune.training.latency import latency_table, saved_table
from megatron_prune.training.loop import Callback, Trainer
from megatron_prune.training.optimizer_memory import AdamSettings
from megatron_prune.training.pruner import Pruner, PruneRules
from megatron_prune.training.removals import Removals
from megatron_prune.training.report import Reporter
from megatron_prune.training.resume import put_aside, resumed
from megatron_prune.training.run_dir import replace_text, writing
from megatron_prune.training.sheared import MEMORY, Shears, take_up
from megatron_prune.training.speed import Throughput, peak_flops
from megatron_prune.training.targets import make_budget


def build_trainer(
    config: Config,
    inputs: Inputs,
    device: torch.device,
    reporter: Reporter,
    micro_batch_size: Callable[[Partition], int] | None = None,
) -> Trainer:
    """Build the model, its engine, the data order and the callbacks. Needs a process group.

    Args:
        config: checked settings.
        inputs: what was read.
        device: of this process.
        reporter: where lines go.
        micro_batch_size: samples per forward pass under a placement, or None where it is fixed.
    """
    prepare_deepspeed()
    parallel = config.parallel
    mesh = make_mesh(device, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    inputs = verified(config, inputs, mesh)
    checkpoint = inputs.checkpoint
    partition = _partition(config, inputs)
    replay, saved = inputs.replay, None if checkpoint is None else run_of(checkpoint)
    budget = make_budget(config, inputs.source, replay, lambda: latency_table(config, inputs.source, mesh, saved))
    progress = _progress(config, inputs, budget, partition)
    # Ranks that read different directories (a --save that is not shared) would build different models.
    agreed(f"resume {progress.step} events {progress.events}", mesh)
    if checkpoint is not None and is_own(checkpoint, config):
        put_aside(inputs.damaged, mesh)
    precision = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    teacher = _teacher(config, inputs, mesh, precision)
    engine = _engine(config, inputs, mesh, partition, precision, teacher)
    train = config.train
    batches = Batches(inputs.train, inputs.valid, train.micro_batch_size, train.global_batch_size, mesh, teacher)
    samples = config.baseline.few_shot_samples
    if samples is not None and progress.continue_from is None:  # the engine's first batch is the calibration
        engine.set_batch(batches.micro_batch_size, samples // (batches.micro_batch_size * mesh.dp_size))
    elif micro_batch_size is not None:
        batches = dataclasses.replace(batches, micro_batch_size=micro_batch_size(partition))
        engine.set_batch(batches.micro_batch_size, batches.per_copy)
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
        _removals(config, budget, replay, progress, engine, inputs.ops.saliency, mesh),
        batches,
        mesh,
        ledger,
        progress,
        _callbacks(config, inputs, mesh, reporter, run_dir),
        micro_batch_size,
    )


def check_start(config: Config, inputs: Inputs) -> None:
    """Refuse what :func:`build_trainer` would refuse of the checkpoint to go on from, without a process group.

    Its checksums are not taken here. Whether a latency is met that has not been measured remains open.

    Raises:
        UserError: the run cannot go on from there with these settings.
    """
    if inputs.checkpoint is None:
        return
    table = saved_table(config, inputs.source, run_of(inputs.checkpoint)) if config.prune.needs_latency else None
    if config.prune.needs_latency and table is None:
        _check_begun(config, inputs.checkpoint.manifest.progress)
        return
    budget = make_budget(config, inputs.source, inputs.replay, None if table is None else lambda: table)
    _progress(config, inputs, budget, _partition(config, inputs))


def _progress(config: Config, inputs: Inputs, budget: Budget | None, partition: Partition) -> Progress:
    """Where the run goes on, if it can."""
    if inputs.checkpoint is None:
        return Progress()
    _check_removed(budget, inputs.replay, partition)
    met = budget is None or budget.met(partition.architecture())
    progress = resumed(config, inputs.checkpoint.manifest, met)
    _check_begun(config, progress)
    if config.baseline.sheared_iters is not None and progress.saliency:
        take_up(_mask_learner(config, inputs.source, torch.device("cpu")), progress.saliency)
    return progress


def _engine(
    config: Config, inputs: Inputs, mesh: Mesh, partition: Partition, precision: torch.dtype, teacher: Teacher | None
) -> PruningEngine:
    """The model and what trains it, not started."""
    optim, sequence_parallel = config.optim, config.parallel.sequence_parallel and mesh.tp_size > 1
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its layer table
        pipeline = build_pipeline(
            partition,
            inputs.ops,
            mesh,
            sequence_parallel=sequence_parallel,
            recompute=config.train.recompute,
            compile_layers=config.train.compile,
            guide=None if teacher is None else teacher.guide(config.distill),
        )
    return PruningEngine(
        pipeline,
        partition,
        deepspeed_config(config, torch.distributed.get_world_size()),
        AdamSettings(inputs.ops.adam, (optim.adam_beta1, optim.adam_beta2), optim.adam_eps, optim.weight_decay),
        mesh,
        precision,
        sequence_parallel,
    )


def _partition(config: Config, inputs: Inputs) -> Partition:
    if inputs.checkpoint is None:
        return Partition.of(inputs.source, config.parallel.tensor_model_parallel_size)
    return placement(inputs.checkpoint.manifest.partition, config)


def _check_begun(config: Config, progress: Progress) -> None:
    """Refuse to prune at once what was trained or pruned before: the samples, or the masks, are those of its start."""
    baseline = config.baseline
    if not progress.step or progress.continue_from is not None or not baseline.prunes_at_once:
        return
    if baseline.few_shot_samples is not None:
        flag, why = f"--few-shot-samples {baseline.few_shot_samples}", "it prunes before the first step"
    elif progress.saliency.startswith(MEMORY):
        return
    else:
        why = "its masks have been cut already" if progress.events else "it was trained without masks"
        flag = f"--sheared-iters {baseline.sheared_iters}"
    raise UserError(
        f"{flag} cannot go on from the checkpoint of step {progress.step}: {why}; start anew with another --save"
    )


def _check_removed(budget: Budget | None, replay: Replay | None, partition: Partition) -> None:
    """Refuse to go on with a checkpoint that pruning could not have led to."""
    arch = partition.architecture()
    if budget is None or budget.met(arch):
        return
    if replay is not None:
        replay.check(partition)
    elif budget.gqa_mode == "balanced" and not arch.uniform_kv:
        raise UserError(
            "--gqa-mode balanced: the checkpoint has K/V heads with different numbers of query heads; go on with "
            "--gqa-mode cluster"
        )


def _removals(
    config: Config,
    budget: Budget | None,
    replay: Replay | None,
    progress: Progress,
    engine: PruningEngine,
    kernels: Saliency,
    mesh: Mesh,
) -> Removals | None:
    """What prunes, or None where nothing does, or where masks have been learned and are gone."""
    if config.baseline.sheared_iters is not None:
        return _shears(config, progress, engine, mesh) if progress.continue_from is None else None
    return None if budget is None else _pruner(config, budget, replay, progress, engine, kernels, mesh)


def _pruner(
    config: Config,
    budget: Budget,
    replay: Replay | None,
    progress: Progress,
    engine: PruningEngine,
    kernels: Saliency,
    mesh: Mesh,
) -> Pruner:
    prune = config.prune
    pruning, gradient = parse_ratio(prune.prune_ratio)
    start = max(config.prune_start_iter, progress.pace_from)
    schedule = Schedule(pruning, gradient, start, progress.pace_spent)
    if config.baseline.few_shot_samples is not None:
        schedule = Schedule(_all_units(engine.partition.source), 1, 0)
    rules = PruneRules(
        budget,
        schedule,
        cast(Metric, prune.prune_metric),  # the schema turns other names into these
        prune.prune_cost or prune.saliency_norm,
        config.train.seed,
        kernels,
        prune.prune_hessian,
        prune.second_order,
        replay,
        prune.saliency_ema,
    )
    pruner = Pruner(engine, mesh, rules)
    pruner.remember(progress.saliency)
    return pruner


def _shears(config: Config, progress: Progress, engine: PruningEngine, mesh: Mesh) -> Shears:
    steps = config.baseline.sheared_iters
    assert steps is not None
    shears = Shears(engine, mesh, _mask_learner(config, engine.partition.source, mesh.device), steps)
    shears.remember(progress.saliency)
    return shears


def _mask_learner(config: Config, source: Architecture, device: torch.device) -> MaskLearner:
    baseline = config.baseline
    assert baseline.sheared_iters is not None
    assert config.prune.target_shape is not None, "validate_config checks it"
    hidden, ffn, heads = parse_shape(config.prune.target_shape).resolve(source)
    target: dict[GroupType, int] = {"stem": hidden, "ffn": ffn, "attention": heads}
    return MaskLearner(source, target, baseline.sheared_lr, baseline.sheared_iters, config.train.seed, device)


def _all_units(source: Architecture) -> int:
    """More units than a run can spend: pruning to the target in one go."""
    widths = {"attention": source.num_attention_heads, "ffn": source.ffn_hidden_size, "stem": source.hidden_size}
    return sum(widths[kind] * units(kind, source) for kind in GROUP_TYPES)


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


def _teacher(config: Config, inputs: Inputs, mesh: Mesh, precision: torch.dtype) -> Teacher | None:
    """The source as its own weights say, whatever the run is at."""
    if not config.distill.distill_weight:
        return None
    weights = inputs.weights
    assert weights is not None, "read_inputs checks it"
    return Teacher(inputs.source, lambda spec: weights.tensor(spec.name).float(), inputs.ops, mesh, precision)


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
    if config.data.instruction_data is not None and inputs.checkpoint is None:
        base = inputs.source_path if inputs.base is None else inputs.base.path
        replace_text(run_dir / BASE_FILE, base_digest(base))


def _config_text(source_path: Path) -> str:
    return (source_path / "config.json" if source_path.is_dir() else source_path).read_text()
