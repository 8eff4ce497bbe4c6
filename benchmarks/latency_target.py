#!/usr/bin/env python
"""Does a search for a latency end where it was asked to, and how does its shape differ from that of a search by size?

    python benchmarks/latency_target.py
    python benchmarks/latency_target.py --context 256 --share 0.5

A model with random weights, some rows and columns of which matter less, is pruned by ``pretrain_prune.py`` to a share
of the milliseconds that it takes for a token (``--target-latency-ms``, ``--prune-cost latency``), then again to the
number of parameters that this search ended with (``--target-params``). Both exports and the source are then timed in
turn in stock transformers, and every time is printed as a ratio to what was asked for. One thread throughout.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from timing import Cell, Spread, add_common_options, describe_machine, positive_int, print_table, write_json
from vs_transformers import write_tokens

from megatron_prune.checkpoint.hf import read_architecture
from megatron_prune.config.values import parse_source_shape
from megatron_prune.deployment.contestants import Contestant, random_model
from megatron_prune.deployment.latency_table import Timing, Workload, time_all
from megatron_prune.evaluation.scoring import load_model
from megatron_prune.training.latency import read_table

ROOT = Path(__file__).resolve().parents[1]
SHAPE = "hidden=512,ffn=2048,heads=8,head_dim=64,layers=4,vocab=2048,tied=1"
NEW_TOKENS = 32
#: Standard deviation of the logarithm of the factors that make rows and columns matter more or less.
UNEVENNESS = 1.0
COLUMNS = ("search", "hidden", "ffn", "heads", "parameters", "asked ms", "expected ms", "measured ms", "of asked")


def main(argv: list[str] | None = None) -> int:
    """Search twice, time the exports, print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=SHAPE, help="of the source (default %(default)s)")
    parser.add_argument("--share", type=float, default=0.6, help="of the source's milliseconds (default %(default)s)")
    parser.add_argument("--context", type=positive_int, default=128, help="tokens before it (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and text (default %(default)s)")
    add_common_options(parser, rounds=9)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{describe_machine()}; {options.shape}, fp32, {options.context} tokens of context")
    work = Workload(options.context, NEW_TOKENS, options.rounds)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        vocab_size = write_source(options.shape, options.seed, scratch / "source")
        write_tokens(scratch / "text", vocab_size, 1 << 16)
        (alone,) = timed({"source": scratch / "source"}, work)
        asked = round(options.share * min(alone.decode), 2)
        latency = {"--target-latency-ms": str(asked), "--prune-cost": "latency"}
        fast = search("by latency", latency, options.context, scratch)
        size = {"--target-params": str(read_architecture(fast).num_parameters())}
        small = search("by size", size, options.context, scratch)
        table = read_table(scratch / "by latency")
        assert table is not None, "the first search has measured it"
        rows: list[list[Cell | Spread]] = []
        directories = {"none: the source": scratch / "source", "by latency": fast, "by size": small}
        for timing in timed(directories, work):
            arch = read_architecture(directories[timing.name])
            widths = arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads
            measured = Spread.of(timing.decode), Spread.of([ms / asked for ms in timing.decode])
            rows.append([timing.name, *widths, timing.parameters, asked, table.milliseconds_of(*widths), *measured])
    print_table(COLUMNS, rows)
    write_json(options.json, f"latency_target {options.shape}", COLUMNS, rows)
    return 0


def write_source(shape: str, seed: int, directory: Path) -> int:
    """A model whose units differ in what they contribute; returns the size of its vocabulary."""
    torch.manual_seed(seed)
    model = random_model(parse_source_shape(shape), "fp32")
    with torch.no_grad():
        for weight in model.parameters():
            for axis in range(weight.dim() if weight.dim() > 1 else 0):
                factors = torch.exp(UNEVENNESS * torch.randn(weight.shape[axis]))
                weight.mul_(factors.unsqueeze(1 - axis))
    model.save_pretrained(directory)
    return int(model.config.vocab_size)


def search(name: str, budget: Mapping[str, str], context: int, scratch: Path) -> Path:
    """Prune to a budget; returns the exported directory.

    Raises:
        SystemExit: the run failed; its own message stands above.
    """
    flags = {
        "--source": str(scratch / "source"),
        "--data-path": str(scratch / "text"),
        "--split": "1,0,0",
        "--save": str(scratch / name),
        "--seq-length": str(context),
        "--micro-batch-size": "1",
        "--global-batch-size": "1",
        "--precision": "fp32",
        "--train-iters": "64",
        "--lr": "1e-4",
        "--lr-warmup-iters": "0",
        "--prune-ratio": "64:1",
        "--save-interval": "0",
        "--eval-interval": "0",
        "--export-at": "target",
        **budget,
    }
    command = [sys.executable, str(ROOT / "pretrain_prune.py"), *(word for pair in flags.items() for word in pair)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=one_thread, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\nthe search {name} ended with exit code {done.returncode}")
    return scratch / name / "exports" / "target"


def timed(directories: Mapping[str, Path], work: Workload) -> list[Timing]:
    """Milliseconds a token of each model, in turn."""
    models = {name: load_model(directory) for name, directory in directories.items()}
    entrants = [
        Contestant(name, "fp32", read_architecture(directories[name]).num_parameters(), model)
        for name, model in models.items()
    ]
    return time_all(entrants, [1], work, lambda done, total: None)


if __name__ == "__main__":
    sys.exit(main())
