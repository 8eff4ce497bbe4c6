"""Run by launcher.py on every rank: counts what a decision sends and what compactions leave behind.

Writes ``rankN.json`` into the run directory: for every compaction the process groups, file descriptors, threads, live
engines and resident memory after it, its peak, the sizes in the formula and how many whole tensors were alive at once;
for every decision the collectives it made.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch.distributed import distributed_c10d

from megatron_prune import pretrain
from megatron_prune.architecture import TensorSpec, tensor_specs
from megatron_prune.parallel.partition import Partition, is_split
from megatron_prune.parallel.states import StateKind, StateSource
from megatron_prune.pruning.groups import GroupType
from megatron_prune.pruning.planner import Decision
from megatron_prune.training import setup
from megatron_prune.training.loop import Trainer

COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "reduce", "all_gather_object", "broadcast_object_list")
RELEASE_TRIES, RELEASE_SECONDS = 50, 0.01


class Traffic:
    """Records every collective made while it is on, whoever makes it."""

    def __init__(self) -> None:
        self.on = False
        self.calls: list[dict[str, Any]] = []
        self._depth = 0
        for name in COLLECTIVES:
            recording = self._recording(name, getattr(distributed_c10d, name))
            # DeepSpeed and this project call through torch.distributed, torch's own object collectives through c10d.
            setattr(dist, name, recording)
            setattr(distributed_c10d, name, recording)

    def _recording(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.on and self._depth == 0:
                tensor = args[0] if isinstance(args[0], torch.Tensor) else None
                size = dist.get_world_size(kwargs.get("group"))
                count = None if tensor is None else tensor.numel()
                dtype = None if tensor is None else str(tensor.dtype).removeprefix("torch.")
                self.calls.append({"name": name, "numel": count, "dtype": dtype, "ranks": size})
            self._depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1

        return call


@dataclasses.dataclass
class Report:
    """What one rank saw."""

    resources: list[dict[str, int]] = dataclasses.field(default_factory=list)
    decisions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    peaks: list[dict[str, int]] = dataclasses.field(default_factory=list)


def held_now() -> dict[str, int]:
    """Everything that must not grow with compactions."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "process_groups": len(distributed_c10d._world.pg_map),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "engines": sum(isinstance(thing, PipelineEngine) for thing in gc.get_objects()),
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
    }


def peak_of(action: Callable[[], None]) -> int:
    """Most bytes of tensors that were allocated beyond those there before, at any moment of an action."""
    with torch.profiler.profile(profile_memory=True) as profile:
        action()
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    total = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        total += change
        peak = max(peak, total)
    return peak


class WholeTensors:
    """Counts the whole tensors alive at once between a source of states and the shards made from them."""

    def __init__(self) -> None:
        self.most = 0
        self._alive: list[weakref.ref[torch.Tensor]] = []

    def counting(self, states: StateSource) -> StateSource:
        """The same source, counted."""

        def counted(spec: TensorSpec, kind: StateKind) -> torch.Tensor:
            whole = states(spec, kind)
            for _ in range(RELEASE_TRIES if self.most < 2 else 1):  # gloo's thread holds a finished sum for a moment
                self._alive = [reference for reference in self._alive if reference() is not None]
                if not self._alive:
                    break
                time.sleep(RELEASE_SECONDS)
            if is_split(spec):  # what every rank has whole becomes the parameter
                self._alive.append(weakref.ref(whole))
            self.most = max(self.most, len(self._alive))
            return whole

        return counted


def shard_sizes(trainer: Trainer, partition: Partition) -> dict[str, int]:
    """Elements of this rank's parameters and of its optimizer fragments under the present placement."""
    engine = trainer.engine
    fragments = [f.values.numel() for _, f in engine._fragments() if f.kind == "master"]  # a tied copy included
    specs = tensor_specs(partition.source)
    return {
        "parameters": sum(entry.parameter.numel() for entry in engine.parameters()),
        "fragments": sum(fragments),
        "largest": max(torch.Size(partition.logical_shape(spec)).numel() for spec in specs),
    }


def watch(trainer: Trainer, report: Report, traffic: Traffic) -> Trainer:
    """Wrap a trainer's compaction and decision; returns it."""
    engine, pruner = trainer.engine, trainer._pruner
    assert pruner is not None
    start, compact, decide = engine.start, engine.compact, pruner.decide
    whole = WholeTensors()

    def start_and_count(partition: Partition, states: StateSource, adam_steps: int) -> None:
        start(partition, whole.counting(states), adam_steps)

    def compact_and_look(partition: Partition, adam_steps: int) -> None:
        before, whole.most = shard_sizes(trainer, engine.partition), 0
        peak = peak_of(lambda: compact(partition, adam_steps))
        after = {f"new_{name}": size for name, size in shard_sizes(trainer, partition).items()}
        report.resources.append(held_now())
        report.peaks.append({"peak": peak, **after, "largest": before["largest"], "whole_tensors": whole.most})

    def decide_and_count(step: int, spent: int, doubted: Callable[[Decision], bool]) -> GroupType | None:
        arch = engine.partition.architecture()
        traffic.calls, traffic.on = [], True
        deferred = decide(step, spent, doubted)
        traffic.on = False
        report.decisions.append(
            {
                "calls": traffic.calls,
                "groups": pruner.chosen,
                "layers": len(engine.layers),
                "all_layers": arch.num_layers,
                "heads": arch.num_attention_heads,
                "ffn": arch.ffn_hidden_size,
                "stem": len(engine.partition.stem),
            }
        )
        return deferred

    setattr(engine, "start", start_and_count)  # noqa: B010  # mypy: a method is replaced
    setattr(engine, "compact", compact_and_look)  # noqa: B010
    setattr(pruner, "decide", decide_and_count)  # noqa: B010
    return trainer


def main() -> int:
    """Train, then write what was seen."""
    report, traffic, build = Report(), Traffic(), setup.build_trainer
    setattr(setup, "build_trainer", lambda *args: watch(build(*args), report, traffic))  # noqa: B010
    code = pretrain.main()
    directory = Path(sys.argv[sys.argv.index("--save") + 1])
    (directory / f"rank{os.environ['RANK']}.json").write_text(json.dumps(dataclasses.asdict(report)))
    return code


if __name__ == "__main__":
    sys.exit(main())
