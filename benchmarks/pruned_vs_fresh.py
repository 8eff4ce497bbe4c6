#!/usr/bin/env python
"""Does a model that was pruned train as fast as one built in that shape, and what did keeping it whole cost?

    python benchmarks/pruned_vs_fresh.py --model 30M

Three engines take turns on steps of the same size: one whose tensors were cut to the shape, one that was built with it,
and one that lost the same groups logically and kept its full size. The widths left over are odd on purpose: pruning
leaves what it leaves. Times are processor time with one thread, wall time with more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pruning_cost import make_source
from timing import Cell, Spread, add_common_options, describe_machine, positive_int, print_table, verdict, write_json
from vs_transformers import LEARNING_RATE, SHAPES, Batch, make_trainer, measure_work, write_tokens

from megatron_prune.checkpoint.hf_config import hf_config_from_architecture
from megatron_prune.parallel.partition import Partition
from megatron_prune.pruning.groups import MiniGroup, remove

#: Hidden channels, FFN channels and heads that are kept; heads so that every layer keeps whole groups of queries.
KEPT = {"1M": (41, 77, 1), "30M": (251, 667, 4), "100M": (379, 1013, 6)}
SIDES = ("pruned and cut", "built fresh", "pruned, kept whole")
#: What the first side may take of the time of the second.
LEAST, MOST = 0.97, 1.03
COLUMNS = ("side", "parameters held", "step ms", "cut / this", "target")


def main(argv: list[str] | None = None) -> int:
    """Measure and print one line for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="30M", help="that is pruned (default %(default)s)")
    parser.add_argument("--micro-batch-size", type=positive_int, default=1, help="samples (default %(default)s)")
    parser.add_argument("--seq-length", type=positive_int, default=256, help="tokens (default %(default)s)")
    parser.add_argument("--threads", type=positive_int, default=1, help="of PyTorch (default %(default)s)")
    add_common_options(parser, rounds=9)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    hidden, ffn, heads = KEPT[options.model]
    shape = f"hidden {hidden}, ffn {ffn}, heads {heads}"
    print(f"{describe_machine()}; {options.model} pruned to {shape}, median of {options.rounds} rounds (quartiles)")
    with tempfile.TemporaryDirectory() as scratch:
        trainers = make_trainers(options, Path(scratch))
        (batch,) = trainers[SIDES[0]].batches.training(0)

        def stepper(trainer: Any) -> Any:
            return lambda: trainer.engine.train_step(iter([batch]), LEARNING_RATE, None)

        measured = measure_work({name: stepper(trainer) for name, trainer in trainers.items()}, options.rounds, 1)
    rows: list[list[Cell | Spread]] = []
    for name, trainer in trainers.items():
        held = sum(entry.parameter.numel() for entry in trainer.engine.parameters())
        ratio = measured.ratio(SIDES[0], name)
        judged = verdict(ratio.median, LEAST, MOST) if name == SIDES[1] else ""
        rows.append([name, f"{held:,}", measured.spread_ms(name), ratio, judged])
    print_table(COLUMNS, rows, digits=3)
    write_json(options.json, f"pruned_vs_fresh {options.model} {shape}", COLUMNS, rows)
    return 0


def make_trainers(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The three sides, each with an engine of its own that has made its first step."""
    source, text = make_source(options.model, scratch), scratch / "text"
    write_tokens(text, SHAPES[options.model]["vocab_size"], 4 * options.micro_batch_size * options.seq_length)
    batch = Batch(options.micro_batch_size, options.seq_length)
    cut, whole = make_trainer(source, text, batch), make_trainer(source, text, batch)
    after = without_groups(cut.engine.partition, *KEPT[options.model])
    for trainer in (cut, whole):
        # Moments appear at the first step; a compaction then moves them as in training.
        trainer.engine.train_step(trainer.batches.training(0), LEARNING_RATE, None)
        trainer.engine.remove(after)
    cut.engine.compact(after.compacted(1), adam_steps=1)
    fresh_source = scratch / "fresh"
    fresh_source.mkdir()
    config = hf_config_from_architecture(after.architecture(), torch_dtype="float32", extra={})
    (fresh_source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return dict(zip(SIDES, (cut, make_trainer(fresh_source, text, batch), whole), strict=True))


def without_groups(partition: Partition, hidden: int, ffn: int, heads: int) -> Partition:
    """Remove random channels and the last heads until the widths are as given."""
    source, draw = partition.source, np.random.default_rng(0)
    layers = range(source.num_layers)
    for unit in draw.permutation(source.hidden_size)[hidden:]:
        partition = remove(partition, MiniGroup("stem", int(unit)))
    for channels in np.stack([draw.permutation(source.ffn_hidden_size)[ffn:] for _ in layers], axis=1):
        partition = remove(partition, MiniGroup("ffn", tuple(int(channel) for channel in channels)))
    for head in range(heads, source.num_attention_heads):
        partition = remove(partition, MiniGroup("attention", (head,) * source.num_layers))
    return partition


if __name__ == "__main__":
    sys.exit(main())
