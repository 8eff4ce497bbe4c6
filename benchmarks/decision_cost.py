#!/usr/bin/env python
"""How does the cost of one pruning decision grow with the hidden size, the layers and the data-parallel copies?

A decision is made as in training, without an engine: every process holds the ZeRO-1 part of o_proj and down_proj that
is its own, sums their scores, adds the sums up with the others, chooses a group and works out what its removal zeroes.
One size varies at a time. Each line is measured in turn with the base (one copy of the first hidden size and number of
layers), in the same process, and every process has one thread. The three parts add up to a decision:

saliency       element scores of the own fragments, and the vectors they go into
communication  sums over processes and the check that all decide alike, waiting for the slowest included
choice         the least of the candidates, and the bookkeeping of its removal
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timing import (
    SECONDS_TO_MS,
    Cell,
    Spread,
    add_common_options,
    describe_machine,
    positive_int,
    print_table,
    write_json,
)
from torch import Tensor

from megatron_prune.architecture import Architecture, tensor_specs, uniform_kv_groups
from megatron_prune.ops.dispatch import build_ops
from megatron_prune.ops.saliency import Saliency
from megatron_prune.parallel.collectives import agreed, all_reduce_sum_, sum_over_stage_
from megatron_prune.parallel.mesh import Mesh, make_mesh
from megatron_prune.parallel.partition import Partition
from megatron_prune.pruning.groups import GROUP_TYPES
from megatron_prune.pruning.planner import Budget, choose, strike_out
from megatron_prune.pruning.saliency import Fragment, Sums, accumulate, is_output_matrix
from megatron_prune.pruning.surgery import dead_elements

HEAD_DIM = 64
FFN_RATIO = 4
VOCAB_SIZE = 49152
PARTS = ("saliency", "communication", "choice")
CPU = torch.device("cpu")

COLUMNS = (
    *("hidden", "layers", "DP", "scored (M)", "decision ms", *(f"{part} ms" for part in PARTS)),
    *("scored/base", "decision/base"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One line: a model and the number of data-parallel copies that decide together."""

    hidden: int
    layers: int
    copies: int

    def architecture(self) -> Architecture:
        """A Llama of SmolLM's proportions."""
        heads = self.hidden // HEAD_DIM
        return Architecture(
            family="llama",
            num_layers=self.layers,
            hidden_size=self.hidden,
            ffn_hidden_size=FFN_RATIO * self.hidden,
            num_attention_heads=heads,
            kv_groups=uniform_kv_groups(self.layers, heads, heads),
            head_dim=HEAD_DIM,
            vocab_size=VOCAB_SIZE,
            tie_embeddings=True,
        )

    def num_scored(self) -> int:
        """Elements of ``o_proj`` and ``down_proj`` in all layers."""
        return self.layers * self.hidden * self.hidden * (1 + FFN_RATIO)


class Stopwatch:
    """Seconds by part of a decision; what communicates inside another part is not counted twice."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def part(self, name: str, inside: str | None = None) -> Iterator[None]:
        """Count the time inside ``with`` for a part, and take it off the part that surrounds it."""
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        self.seconds[name] += spent
        if inside is not None:
            self.seconds[inside] -= spent


#: Seconds of the parts, for every round and case.
Rounds = list[list[dict[str, float]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, sizes, what in (
        ("--hidden", [512, 1024, 2048], f"hidden sizes, multiples of {HEAD_DIM}; ffn is {FFN_RATIO} times as wide"),
        ("--layers", [4, 8, 16], "numbers of layers"),
        ("--dp", [1, 2, 4], "numbers of processes, 1 first"),
    ):
        parser.add_argument(flag, nargs="+", type=positive_int, default=sizes, help=f"{what} (default {sizes})")
    add_common_options(parser, rounds=15)
    options = parser.parse_args(argv)
    if any(hidden % HEAD_DIM for hidden in options.hidden):
        parser.error(f"--hidden {' '.join(map(str, options.hidden))}: give multiples of {HEAD_DIM}")
    if options.dp[0] != 1:
        parser.error(f"--dp {' '.join(map(str, options.dp))}: the base has one process, so 1 comes first")
    base = Case(options.hidden[0], options.layers[0], 1)
    alone = [base, *(Case(hidden, base.layers, 1) for hidden in options.hidden[1:])]
    alone += [Case(base.hidden, layers, 1) for layers in options.layers[1:]]
    groups = [alone, *([base, dataclasses.replace(base, copies=copies)] for copies in options.dp[1:])]
    print(f"{describe_machine()}; one thread per process, median (quartiles) of {options.rounds} rounds")
    rows: list[list[Cell | Spread]] = []
    for index, cases in enumerate(groups):
        rounds = _run_group(cases, options.rounds)
        rows += [_row(cases, which, rounds) for which in range(min(index, 1), len(cases))]
    print_table(COLUMNS, rows)
    write_json(options.json, "decision_cost", COLUMNS, rows)
    return 0


def _row(cases: Sequence[Case], which: int, rounds: Rounds) -> list[Cell | Spread]:
    case, base = cases[which], cases[0]
    parts = [Spread.of([entry[which][name] * SECONDS_TO_MS for entry in rounds]).median for name in PARTS]
    totals = [(sum(entry[which].values()), sum(entry[0].values())) for entry in rounds]
    return [
        *(case.hidden, case.layers, case.copies, case.num_scored() / 1e6),
        *(Spread.of([total * SECONDS_TO_MS for total, _ in totals]).median, *parts),
        *(case.num_scored() / base.num_scored(), Spread.of([total / least for total, least in totals])),
    ]


def _run_group(cases: Sequence[Case], rounds: int) -> Rounds:
    """Start as many processes as the last case has copies, and return what the first of them measured."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = (list(cases), rounds, Path(directory))
        # Forked: nothing here has started a thread yet, and importing torch again costs each process seconds.
        mp.start_processes(_work, args=arguments, nprocs=cases[-1].copies, join=True, start_method="fork")
        measured: Rounds = json.loads((Path(directory) / "rounds.json").read_text(encoding="utf-8"))
    return measured


def _work(rank: int, cases: Sequence[Case], rounds: int, directory: Path) -> None:
    torch.set_num_threads(1)
    world_size = cases[-1].copies
    dist.init_process_group("gloo", f"file://{directory / 'store'}", rank=rank, world_size=world_size)
    mesh = make_mesh(CPU)
    alone = dataclasses.replace(mesh, world_size=1, dp_size=1, stage_group=None)
    kernels = build_ops({}, CPU).saliency
    deciders = [
        Decider(case, rank if case.copies > 1 else 0, mesh if case.copies > 1 else alone, kernels)
        for case in cases
        if case.copies > 1 or rank == 0
    ]
    measured: Rounds = []
    for _ in range(rounds + 1):
        entry = []
        for decider in deciders:
            if decider.case.copies > 1:
                dist.barrier()  # the others wait here while the first is at the base
            entry.append(decider.decide())
        measured.append(entry)
    if rank == 0:
        (directory / "rounds.json").write_text(json.dumps(measured[1:]), encoding="utf-8")  # the first one allocates
    dist.destroy_process_group()


class Decider:
    """Makes the same decision again and again.

    Args:
        case: the model.
        rank: whose part of the optimizer.
        mesh: the processes that decide together.
        kernels: of the saliency sums.
    """

    def __init__(self, case: Case, rank: int, mesh: Mesh, kernels: Saliency) -> None:
        self.case = case
        self._mesh = mesh
        self._kernels = kernels
        self._partition = Partition.of(case.architecture())
        self._fragments = list(_own_fragments(case.architecture(), rank, case.copies))
        self._budget = Budget(case.architecture().num_parameters() // 2, None, dict.fromkeys(GROUP_TYPES, 1))

    def decide(self) -> dict[str, float]:
        """One decision; returns the seconds of each part."""
        watch, partition, mesh = Stopwatch(), self._partition, self._mesh
        with watch.part("saliency"):
            vectors = accumulate(
                *(self._fragments, partition, "taylor", self._kernels, range(self.case.layers)),
                Sums(_timed(watch, sum_over_stage_, mesh), _timed(watch, all_reduce_sum_, mesh)),
                CPU,
            )
        with watch.part("choice"):
            decision = choose(vectors, partition, self._budget, "mean")
            assert decision is not None, "the model is at its full size"
            with watch.part("communication", inside="choice"):
                agreed(json.dumps([decision.group.type, decision.group.removed]), mesh)
            strike_out(vectors, decision.group)
            list(dead_elements(partition, decision.partition))
            self._budget.met(decision.partition.architecture())
        return watch.seconds


def _timed(watch: Stopwatch, collective: Callable[[Tensor, Mesh], None], mesh: Mesh) -> Callable[[Tensor], None]:
    def run(vector: Tensor) -> None:
        with watch.part("communication", inside="saliency"):
            collective(vector, mesh)

    return run


def _own_fragments(arch: Architecture, rank: int, copies: int) -> Iterator[Fragment]:
    """The output matrices' share of one of ``copies`` equal cuts through all matrices laid end to end, as in ZeRO-1."""
    specs = [spec for spec in tensor_specs(arch) if len(spec.axes) == 2]
    shapes = [(arch.axis_size(spec.axes[0], spec.layer), arch.axis_size(spec.axes[1], spec.layer)) for spec in specs]
    ends = list(itertools.accumulate(rows * columns for rows, columns in shapes))
    first, last = ends[-1] * rank // copies, ends[-1] * (rank + 1) // copies
    draw = torch.Generator().manual_seed(rank)
    for spec, shape, end in zip(specs, shapes, ends, strict=True):
        begin = end - shape[0] * shape[1]
        start, stop = max(begin, first), min(end, last)
        if is_output_matrix(spec) and start < stop:
            weight, grad = (torch.randn(stop - start, generator=draw) for _ in range(2))
            yield Fragment(spec, weight, grad, start - begin, shape)


if __name__ == "__main__":
    sys.exit(main())
