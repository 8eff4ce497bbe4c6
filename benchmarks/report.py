#!/usr/bin/env python
"""Run the benchmarks one after another, keep their tables, and write docs/performance.md with a picture of them.

    python benchmarks/report.py                        # everything, about a quarter of an hour on two cores
    python benchmarks/report.py --only kernels         # these alone; the page shows the old tables of the others
    python benchmarks/report.py --render               # no measurement: the page of the tables that are there

Every benchmark is a process of its own. One that fails is named at the end and leaves no table. The tables stay in
runs/bench/ as JSON, those of GPU benchmarks from wherever there was one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from report_plot import draw

ROOT = Path(__file__).resolve().parents[1]
SECONDS_A_BENCHMARK = 1800
SIGNIFICANT_DIGITS = 3
PAGE, PICTURE = "performance.md", "performance.png"


@dataclasses.dataclass(frozen=True)
class Run:
    """One command and where it is shown.

    Attributes:
        name: of its JSON file.
        heading: of its section; runs of one heading follow each other.
        command: script and arguments.
        needs_gpu: measured only where there is one.
    """

    name: str
    heading: str
    command: tuple[str, ...]
    needs_gpu: bool = False


KERNELS = "Kernels: how far from reading weight and gradient once"
DECISION = "Growth of a decision's cost"
COST = "What pruning adds to a step"
FRESH = "A pruned model against one built in its shape"
STEP = "A step against transformers under DeepSpeed"
ONE_SHOT = "One-shot pruning against torch-pruning and ModelOpt"
GPU = "On a GPU"
#: How to read each section's tables.
NOTES: Mapping[str, str] = {
    KERNELS: "A ratio is the time of the first over that of the second. The floor reads both operands and does nothing "
    "with them; the fallback is what runs where the kernels were not built.",
    DECISION: "The first line is the base. Scored elements are what a decision has to read; a column beside them says "
    "how its time grew.",
    COST: "Per cent of a step without pruning. A step in G prunes P units, so at 1:9 all but the compaction is divided "
    "by nine. A unit is taken for an event of its own; a head is one event of many units and costs less. The parts do "
    "not grow with the batch and these steps are small, so that in a larger batch the shares are smaller. "
    "with/without is the same, of whole steps and without compaction: noise and all.",
    FRESH: "cut / this is the time of the first side over that of the line.",
    STEP: "Losses, gradient norms and gradients of the first step agree, or there is no table. The peak is the memory "
    "of tensors beyond what is there before the step.",
    ONE_SHOT: "From a directory to a directory: reading and gradients are transformers' on every side, what differs is "
    "prune and write, and the more tokens are used for gradients, the less that counts. With a width given for each "
    "axis our side sorts each axis once; the planner's loop of training, which weighs the axes against each other "
    "after every removal, takes longer and is not timed here. Here heads go by score alone, which leaves KV heads "
    "with unequal numbers of queries and makes the export repeat them; torch-pruning takes as many from each.",
    GPU: "",
}


def _step(model: str, precision: str, samples: int, seq_length: int, rounds: int) -> Run:
    words = ["--model", model, "--precision", precision, "--micro-batch-size", str(samples)]
    words += ["--seq-length", str(seq_length), "--rounds", str(rounds)]
    return Run(f"step_{model}_{precision}_{samples}x{seq_length}", STEP, ("vs_transformers.py", *words))


RUNS: tuple[Run, ...] = (
    _step("30M", "fp32", samples=4, seq_length=256, rounds=3),
    _step("100M", "fp32", samples=4, seq_length=256, rounds=2),
    _step("100M", "fp32", samples=1, seq_length=256, rounds=2),
    # Short: without instructions for bf16, PyTorch's own products take minutes.
    _step("30M", "bf16", samples=1, seq_length=32, rounds=2),
    Run("cost_demo", COST, ("pruning_cost.py", "--model", "demo")),
    Run(
        "cost_100M",
        COST,
        ("pruning_cost.py", *["--model", "100M", "--micro-batch-size", "1", "--rounds", "3", "--compactions", "2"]),
    ),
    Run("fresh_30M", FRESH, ("pruned_vs_fresh.py", "--model", "30M")),
    Run("one_shot_100M", ONE_SHOT, ("one_shot.py", "--model", "100M")),
    Run("kernels", KERNELS, ("kernels.py", "--rounds", "11")),
    Run("decision_cost", DECISION, ("decision_cost.py",)),
    Run("gpu_kernels", GPU, ("gpu_kernels.py",), needs_gpu=True),
    Run("gpu_step", GPU, ("gpu_step.py",), needs_gpu=True),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, then render; 1 when a benchmark failed, 2 when there is nothing to show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    names = [run.name for run in RUNS]
    which.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    which.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--tables", type=Path, default=ROOT / "runs" / "bench", help="of JSON (default %(default)s)")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="of the page (default %(default)s)")
    options = parser.parse_args(argv)
    options.tables.mkdir(parents=True, exist_ok=True)
    failed = [run.name for run in chosen(options) if not measure(run, options.tables)]
    tables = read_tables(options.tables)
    if not tables:
        print(f"{options.tables} has no tables; run without --render first", file=sys.stderr)
        return 2
    options.docs.mkdir(parents=True, exist_ok=True)
    drawn = draw(tables, options.docs / PICTURE)
    (options.docs / PAGE).write_text(render(tables, drawn), encoding="utf-8")
    print(f"\nwrote {options.docs / PAGE}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def chosen(options: argparse.Namespace) -> list[Run]:
    """What is to be measured."""
    if options.render:
        return []
    if options.only:
        return [run for run in RUNS if run.name in options.only]
    import torch

    return [run for run in RUNS if torch.cuda.is_available() or not run.needs_gpu]


def shown_command(run: Run) -> str:
    """What a reader types to measure this again."""
    return shlex.join(["python", f"benchmarks/{run.command[0]}", *run.command[1:]])


def measure(run: Run, tables: Path) -> bool:
    """Run one benchmark; False when it failed, its old table then being gone."""
    script, *arguments = run.command
    file = tables / f"{run.name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments, "--json", str(file)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    print(f"\n{shown_command(run)}", flush=True)
    began = time.monotonic()
    try:
        status = subprocess.run(command, env=environment, timeout=SECONDS_A_BENCHMARK, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"{run.name} took longer than {SECONDS_A_BENCHMARK} s", file=sys.stderr)
        return False
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    if status or not file.exists():
        return False
    table = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**table, "command": shown_command(run)}, indent=2) + "\n", encoding="utf-8")
    return True


def read_tables(directory: Path) -> dict[str, dict[str, Any]]:
    """The tables that are there, by the name of their run."""
    files = {run.name: directory / f"{run.name}.json" for run in RUNS}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def render(tables: Mapping[str, Mapping[str, Any]], drawn: bool) -> str:
    """The page."""
    lines = [
        "# Performance",
        "",
        "Written by `python benchmarks/report.py`; `make report` measures again and writes it anew.",
        "",
        "The sides of a ratio take turns in one process and are compared within a round. A cell is the median and, in "
        "brackets, the quartiles over the rounds. Steps and one-shot pruning are in processor time of one thread, "
        "kernels and decisions in wall time. Compare ratios rather than milliseconds. Where a number has a target, the "
        "target stands beside it, met or missed.",
    ]
    if drawn:
        lines += ["", f"![Time of the peers over ours; what pruning adds to a step]({PICTURE})"]
    for heading, note in NOTES.items():
        runs = [run for run in RUNS if run.heading == heading and run.name in tables]
        if runs:
            lines += ["", f"## {heading}", *(["", note] if note else [])]
        for run in runs:
            table = tables[run.name]
            lines += ["", f"`{table['command']}` on {_machine(table['machine'])}:", "", *markdown(table["rows"])]
    return "\n".join(lines) + "\n"


def markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table's lines."""
    columns = list(rows[0])
    lines = [f"| {' | '.join(column.replace('_', ' ') for column in columns)} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(_cell(row[column]) for column in columns)} |" for row in rows]


def _machine(facts: Mapping[str, Any]) -> str:
    words = [str(facts["gpu"])] if "gpu" in facts else [f"{facts['cores']} cores", str(facts["instructions"])]
    return ", ".join([*words, f"PyTorch {facts['torch']}", f"{facts['threads']} thread(s)"])


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{_number(value['median'])} ({_number(value['low'])} .. {_number(value['high'])})"
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10**SIGNIFICANT_DIGITS else f"{value:.{SIGNIFICANT_DIGITS}g}"


if __name__ == "__main__":
    sys.exit(main())
