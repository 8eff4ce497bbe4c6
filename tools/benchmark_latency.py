#!/usr/bin/env python
"""Time an export as its users will run it: one token after another in stock transformers, at batch 1.

    python tools/benchmark_latency.py runs/fast/exports/target --context 2048

Prints milliseconds a token, as a run's --target-latency-ms counts them. With --predict RUN also what the table of that
run's directory (latency.json) says of the shape.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_prune.checkpoint.hf import read_architecture
from megatron_prune.errors import EXIT_BAD_INPUT, UserError
from megatron_prune.training.latency import LATENCY_FILE, read_table, time_decoding


def main(argv: Sequence[str] | None = None) -> int:
    """Time one export; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("export", type=Path, help="directory of a Hugging Face model")
    parser.add_argument("--context", type=int, default=2048, help="tokens before the one that is decoded")
    parser.add_argument("--predict", type=Path, metavar="RUN", help="run directory with a latency.json")
    options = parser.parse_args(argv)
    try:
        for line in measured(options.export, options.context, options.predict):
            print(line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def measured(export: Path, context: int, run_dir: Path | None) -> list[str]:
    """The lines to print.

    Raises:
        UserError: a directory does not hold what it should.
    """
    if context < 1:
        raise UserError(f"--context {context} must be 1 or more")
    arch = read_architecture(export)
    table = None if run_dir is None else read_table(run_dir)
    if run_dir is not None and table is None:
        raise UserError(f"--predict {run_dir} has no {LATENCY_FILE}; give a run that was started with a latency target")
    from transformers import AutoModelForCausalLM  # seconds to import

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(export, dtype="auto")
    model.to(device)
    lines = [f"{time_decoding(model, context):.3f} ms a token, {context} tokens of context, {device}, {model.dtype}"]
    if table is not None:
        widths = arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads
        asked = f"after {table.about['context']} tokens of context in {table.about['precision']}"
        lines.append(f"{table.milliseconds_of(*widths):.3f} ms expected {asked}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
