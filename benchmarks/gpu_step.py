#!/usr/bin/env python
"""What does a training step cost on one GPU, how much memory does it take, and how long is a compaction?

The model has the shape of SmolLM-1.7B by default and random weights. It trains in bf16 through the engine, data order
and optimizer of a real run; the tokens are random too, which changes no cost. Then one compaction quantum of hidden and
FFN channels and one head of every layer are removed and cut away, and the smaller model is measured. Needs an NVIDIA
GPU whose dense bf16 peak this project knows; MFU is the share of it, by the FLOPs of a step's own shape.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from timing import (
    EXIT_UNAVAILABLE,
    Cell,
    Spread,
    add_common_options,
    describe_machine,
    measure,
    positive_int,
    print_table,
    synchronizer,
    write_json,
)

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.checkpoint.hf import hf_config_from_architecture
from megatron_prune.config import Config
from megatron_prune.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from megatron_prune.data.indexed import IndexedDatasetWriter, best_dtype
from megatron_prune.parallel.mesh import init_process_group
from megatron_prune.parallel.partition import Partition
from megatron_prune.pruning.groups import MiniGroup, remove
from megatron_prune.training.inputs import read_inputs, read_source
from megatron_prune.training.loop import Trainer
from megatron_prune.training.report import Reporter
from megatron_prune.training.speed import peak_flops

LEARNING_RATE = 1e-5
GIB = 2**30
WARMUP_STEPS = 3
COLUMNS = ("model", "parameters (M)", "step s", "tokens/s", "MFU %", "peak GiB", "compaction s")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print one line before and one after a compaction."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, size, what in (
        ("--hidden", 2048, "hidden size"),
        ("--ffn", 8192, "FFN channels"),
        ("--heads", 32, "attention heads, each with its own keys and values"),
        ("--layers", 24, "decoder layers"),
        ("--vocab", 49152, "tokens of the vocabulary"),
        ("--seq-length", 2048, "tokens of a sequence"),
        ("--micro-batch-size", 4, "sequences of a forward pass"),
        ("--global-batch-size", 16, "sequences of a step"),
        ("--quantum", 64, "hidden and FFN channels that a compaction takes away"),
    ):
        parser.add_argument(flag, type=positive_int, default=size, help=f"{what} (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the decoder layers, as --compile of a run")
    add_common_options(parser, rounds=10)
    options = parser.parse_args(argv)
    if options.hidden % options.heads or options.hidden // options.heads % 2:
        parser.error(f"--hidden {options.hidden} and --heads {options.heads} make no even head size")
    if options.quantum >= min(options.hidden, options.ffn) or options.heads < 2:
        parser.error("a compaction would leave nothing: lower --quantum, or give 2 --heads or more")
    if options.global_batch_size % options.micro_batch_size:
        parser.error(f"--global-batch-size {options.global_batch_size}: give a multiple of --micro-batch-size")
    if not torch.cuda.is_available():
        print(f"{parser.prog} needs an NVIDIA GPU and there is none here")
        return EXIT_UNAVAILABLE
    peak = peak_flops(torch.cuda.get_device_name())
    if peak is None:
        print(f"{parser.prog}: the bf16 peak of {torch.cuda.get_device_name()} is not in training/speed.py; add it")
        return EXIT_UNAVAILABLE
    print(f"{describe_machine()}; {options.rounds} steps of {options.global_batch_size} x {options.seq_length} tokens")
    rows = measure_run(options, peak)
    print_table(COLUMNS, rows)
    write_json(options.json, "gpu_step", COLUMNS, rows)
    return 0


def measure_run(options: argparse.Namespace, peak: float) -> list[list[Cell | Spread]]:
    """Train, compact, train: the rows of the table.

    Args:
        options: of the command line.
        peak: dense bf16 FLOP/s of the device.
    """
    from megatron_prune.training.setup import build_trainer  # imports DeepSpeed: seconds, and not without a GPU

    with tempfile.TemporaryDirectory() as directory:
        config = _write_inputs(options, Path(directory))
        source_path, source = read_source(config)
        inputs = read_inputs(config, source_path, source)
        device = init_process_group()
        try:
            with Reporter(None, config, is_main=True, total_steps=None) as reporter:
                trainer = build_trainer(config, inputs, device, reporter)
                run = TimedRun(trainer, options.rounds, peak)
                whole = run.measure("whole")
                seconds = run.compact(options.quantum)
                smaller = run.measure("compacted")
        finally:
            torch.distributed.destroy_process_group()
    return [[*whole, "-"], [*smaller, seconds]]


class TimedRun:
    """Steps of a trainer's engine with the trainer's data, timed.

    Args:
        trainer: built, nothing trained yet.
        rounds: steps of a measurement.
        peak: dense bf16 FLOP/s of the device.
    """

    def __init__(self, trainer: Trainer, rounds: int, peak: float) -> None:
        self._trainer = trainer
        self._rounds = rounds
        self._peak = peak
        self._device = trainer.mesh.device
        self._samples = 0
        self._steps = 0

    def measure(self, name: str) -> list[Cell | Spread]:
        """Time steps of the model as it is: all columns but that of the compaction."""
        torch.cuda.reset_peak_memory_stats(self._device)
        wait = synchronizer(self._device)
        found = measure({"step": self._step}, self._rounds, WARMUP_STEPS, wait).spread_ms("step")
        seconds = found.median / 1e3
        config, arch = self._trainer.config, self._trainer.architecture
        flops = config.batch_tokens * arch.flops_per_token(config.data.seq_length)
        memory = torch.cuda.max_memory_allocated(self._device) / GIB
        share = 100 * flops / seconds / self._peak
        return [name, arch.num_parameters() / 1e6, seconds, config.batch_tokens / seconds, share, memory]

    def compact(self, quantum: int) -> float:
        """Remove channels and a head, then cut them away; returns the seconds that the cut alone takes."""
        engine = self._trainer.engine
        engine.remove(_without_some(engine.partition, quantum))
        after = engine.partition.compacted(quantum)
        found = measure({"compaction": lambda: engine.compact(after, self._steps)}, 1, 0, synchronizer(self._device))
        return found.seconds["compaction"][0]

    def _step(self) -> None:
        batches = self._trainer.batches.training(self._samples)
        result = self._trainer.engine.train_step(batches, LEARNING_RATE, None)
        assert result.applied, f"the gradient of step {self._steps} is not finite"
        self._samples += self._trainer.config.train.global_batch_size
        self._steps += 1


def _without_some(partition: Partition, quantum: int) -> Partition:
    """The partition less the first ``quantum`` channels of stem and FFN, and the first head of every layer."""
    layers = partition.source.num_layers
    for index in range(quantum):
        partition = remove(partition, MiniGroup("stem", index))
        partition = remove(partition, MiniGroup("ffn", (index,) * layers))
    return remove(partition, MiniGroup("attention", (0,) * layers))


def _write_inputs(options: argparse.Namespace, directory: Path) -> Config:
    """A source without weights and a data set of random tokens, and the settings that use them."""
    arch = Architecture(
        family="llama",
        num_layers=options.layers,
        hidden_size=options.hidden,
        ffn_hidden_size=options.ffn,
        num_attention_heads=options.heads,
        kv_groups=uniform_kv_groups(options.layers, options.heads, options.heads),
        head_dim=options.hidden // options.heads,
        vocab_size=options.vocab,
        max_position_embeddings=options.seq_length,
        tie_embeddings=True,
    )
    source = directory / "source"
    source.mkdir()
    content = hf_config_from_architecture(arch, torch_dtype="bfloat16", extra={})
    (source / "config.json").write_text(json.dumps(content), encoding="utf-8")
    prefix = str(directory / "tokens")
    steps = 2 * (options.rounds + WARMUP_STEPS)
    draw = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, best_dtype(arch.vocab_size)) as writer:
        for _ in range(options.global_batch_size * steps):
            writer.add_document(draw.integers(arch.vocab_size, size=options.seq_length + 1))
        writer.finalize()
    return Config(
        model=ModelConfig(source=str(source)),
        data=DataConfig(data_path=(prefix,), split="1,0,0", seq_length=options.seq_length),
        train=TrainConfig(
            train_iters=steps,
            micro_batch_size=options.micro_batch_size,
            global_batch_size=options.global_batch_size,
            precision="bf16",
            compile=options.compile,
        ),
        run=RunConfig(eval_interval=0),
    )


if __name__ == "__main__":
    sys.exit(main())
