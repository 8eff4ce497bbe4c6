#!/usr/bin/env python
"""What does pruning add to the time of a training step, and which part of it does?

    python benchmarks/pruning_cost.py --model demo
    python benchmarks/pruning_cost.py --model 100M --rounds 3

A step that prunes and a step that does not take turns on the same trainer; every part of the former is timed where the
trainer calls it. Compaction is measured by itself, in steps of a few tokens that prune until tensors have been cut
several times, and divided among the units removed between two. At ``P:G`` a step in G prunes P units:

    cost of a step = (saliency + communication + P (choice + zeroing)) / G + P / G compaction of a unit

which takes every unit for an event of its own; a head is one event of many units and costs less. Times are processor
time with one thread, wall time with more. There is one process here, so communication is the bookkeeping of it;
``decision_cost.py`` measures it between processes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timing import (
    SECONDS_TO_MS,
    Cell,
    Spread,
    add_common_options,
    describe_machine,
    positive_int,
    print_table,
    verdict,
    write_json,
)
from vs_transformers import LEARNING_RATE, SHAPES, Batch, clock, make_trainer, measure_work, write_tokens

from megatron_prune.pruning.groups import units
from megatron_prune.training import observing
from megatron_prune.training import pruner as pruner_module

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo" / "source"
RATIOS = {"1:9": (1, 9), "1:1": (1, 1), "4:1": (4, 1)}
#: Per cent of a step that all parts together may take.
MOST: dict[str, float] = {"1:9": 1.0, "1:1": 3.0}
PARTS = ("saliency", "communication", "choice", "zeroing")
#: Tokens of a step in which only the compaction is of interest.
FEW_TOKENS = 8
#: Units a step prunes on the way to a compaction.
HASTE = 8
COLUMNS = ("ratio", "step ms", *(f"{part} %" for part in PARTS), "compaction %", "all %", "target", "with/without")


class Parts:
    """Seconds of each part, as the trainer spends them; a part inside another counts once, for itself."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys((*PARTS, "compaction"), 0.0)
        self.removed_units = 0
        self.compactions = 0
        self._open: list[str] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is inside ``with`` for a part and take it off the part around it."""
        began = clock()
        self._open.append(name)
        yield
        self._open.pop()
        spent = clock() - began
        self.seconds[name] += spent
        if self._open:
            self.seconds[self._open[-1]] -= spent

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, counted for a part."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return run

    @contextlib.contextmanager
    def watch(self, trainer: Any) -> Iterator[None]:
        """Time a trainer's parts inside ``with``."""
        engine, pruner = trainer.engine, trainer._pruner
        remove, compact = engine.remove, engine.compact

        def counted_remove(partition: Any) -> None:
            before, after = engine.partition.architecture(), partition.architecture()
            kinds = {"attention": "num_attention_heads", "ffn": "ffn_hidden_size", "stem": "hidden_size"}
            (kind,) = (kind for kind, width in kinds.items() if getattr(before, width) != getattr(after, width))
            self.removed_units += units(kind, before)  # type: ignore[arg-type]
            with self.part("zeroing"):
                remove(partition)

        def counted_compact(*args: Any) -> None:
            self.compactions += 1
            with self.part("compaction"):
                compact(*args)

        communicating = [
            *((pruner_module, name) for name in ("agreed", "sum_over_stages_")),
            *((observing, name) for name in ("all_reduce_sum_", "sum_over_copies_", "sum_over_stage_")),
        ]
        with (
            contextlib.ExitStack() as collectives,
            mock.patch.object(pruner, "decide", self.timed("choice", pruner.decide)),
            mock.patch.object(pruner, "_measure", self.timed("saliency", pruner._measure)),
            mock.patch.object(engine, "remove", counted_remove),
            mock.patch.object(engine, "compact", counted_compact),
        ):
            for module, name in communicating:
                timed = self.timed("communication", getattr(module, name))
                collectives.enter_context(mock.patch.object(module, name, timed))
            yield


@dataclasses.dataclass(frozen=True)
class Costs:
    """What was measured of steps that prune one number of units, without a compaction.

    Attributes:
        step: seconds of a step without pruning, median.
        parts: seconds of each part in a step that prunes, by name, medians.
        ratio: a step that prunes over the one beside it that does not.
    """

    step: float
    parts: dict[str, float]
    ratio: Spread


def main(argv: list[str] | None = None) -> int:
    """Measure and print one line for each ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ("demo", *sorted(SHAPES))
    parser.add_argument("--model", choices=models, default="demo", help="what is trained (default %(default)s)")
    parser.add_argument("--micro-batch-size", type=positive_int, default=8, help="samples (default %(default)s)")
    parser.add_argument("--seq-length", type=positive_int, default=256, help="tokens (default %(default)s)")
    parser.add_argument("--prune-align", type=positive_int, default=64, help="quantum (default %(default)s)")
    parser.add_argument("--compactions", type=positive_int, default=3, help="how many to measure (default %(default)s)")
    parser.add_argument("--threads", type=positive_int, default=1, help="of PyTorch (default %(default)s)")
    add_common_options(parser, rounds=7)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    tokens = options.micro_batch_size * options.seq_length
    print(f"{describe_machine()}; {options.model}, {tokens} tokens a step, {options.rounds} rounds")
    with tempfile.TemporaryDirectory() as scratch:
        source = make_source(options.model, Path(scratch))
        vocab_size = json.loads((source / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        text = Path(scratch) / "text"
        write_tokens(text, vocab_size, 64 * tokens)
        batch = Batch(options.micro_batch_size, options.seq_length)
        costs = step_costs(source, text, batch, options.rounds)
        compaction, events = compaction_of_a_unit(source, text, options)
    rows = [_row(name, costs[pruning], pruning, steps, compaction) for name, (pruning, steps) in RATIOS.items()]
    print_table(COLUMNS, rows, digits=3)
    print(f"a compaction every {events:.0f} units here, {compaction * events * SECONDS_TO_MS:.0f} ms each")
    write_json(options.json, f"pruning_cost {options.model} {tokens} tokens", COLUMNS, rows)
    return 0


def make_source(model: str, scratch: Path) -> Path:
    """The demo's model, or one with random weights."""
    if model == "demo":
        return DEMO
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        **SHAPES[model],
    }
    path = scratch / "source"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


def pruning_trainer(source: Path, text: Path, batch: Batch, units_a_step: int, align: int) -> Any:
    """A trainer with a target far away."""
    flags = {"target-shape": "hidden=16,ffn=16,heads=1", "prune-ratio": f"{units_a_step}:1", "prune-start-iter": 0}
    return make_trainer(source, text, batch, {**flags, "prune-align": align})


def step_costs(source: Path, text: Path, batch: Batch, rounds: int) -> dict[int, Costs]:
    """Steps that do not prune and steps that prune each ratio's units, in turn on one trainer."""
    amounts = sorted({pruning for pruning, _ in RATIOS.values()})
    trainer = pruning_trainer(source, text, batch, amounts[-1], align=0)
    sample = next(iter(trainer.batches.training(0)))
    seconds: dict[int, list[dict[str, float]]] = {amount: [] for amount in amounts}

    def pruning(amount: int) -> Callable[[], None]:
        def run() -> None:
            parts = Parts()
            with parts.watch(trainer):
                step(trainer, already_spent=amounts[-1] - amount)
            seconds[amount].append(parts.seconds)

        return run

    def without() -> None:
        trainer.engine.train_step(iter([sample]), LEARNING_RATE, None)

    measured = measure_work({"0": without, **{str(amount): pruning(amount) for amount in amounts}}, rounds, warmup=1)
    step_seconds = statistics.median(measured.seconds["0"])
    return {
        amount: Costs(
            step_seconds,
            {part: statistics.median(entry[part] for entry in entries[1:]) for part in PARTS},
            measured.ratio(str(amount), "0"),
        )
        for amount, entries in seconds.items()
    }


def step(trainer: Any, already_spent: int = 0) -> None:
    """A step that is due to prune: the schedule is put back to its beginning, where a head leaves no debt."""
    trainer.progress = dataclasses.replace(trainer.progress, step=0, units_spent=already_spent)
    trainer._step()


def compaction_of_a_unit(source: Path, text: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of compaction for each unit removed, and the units between two compactions."""
    trainer = pruning_trainer(source, text, Batch(1, FEW_TOKENS), HASTE, options.prune_align)
    parts = Parts()
    with parts.watch(trainer):
        while parts.compactions < options.compactions:
            step(trainer)
    return parts.seconds["compaction"] / parts.removed_units, parts.removed_units / parts.compactions


def _row(name: str, costs: Costs, pruning: int, steps: int, compaction: float) -> list[Cell | Spread]:
    shares = [100 * costs.parts[part] / steps / costs.step for part in PARTS]
    amortised = 100 * compaction * pruning / steps / costs.step
    with_pruning = dataclasses.astuple(costs.ratio)
    ratio = Spread(*(1 + (value - 1) / steps for value in with_pruning))
    whole = sum(shares) + amortised
    return [name, costs.step * SECONDS_TO_MS, *shares, amortised, whole, verdict(whole, most=MOST.get(name)), ratio]


if __name__ == "__main__":
    sys.exit(main())
