#!/usr/bin/env python
"""Make an export's 8-bit form (W8A8) and compare it with fp32 and bf16.

    python tools/quantize.py runs/demo/export                    # writes runs/demo/export-int8
    python tools/quantize.py runs/457m --smooth --clip --output 457m-int8

Takes a Hugging Face directory or a run directory, whose newest checkpoint is exported first. Linear layers get int8
weights (a scale per output channel) and int8 activations (a scale per token); the embedding, and with it a tied head,
gets int8 weights. Stock transformers loads the result where torchao is installed:

    AutoModelForCausalLM.from_pretrained("runs/demo/export-int8")

Perplexity and questions come from text that the demo's models have not seen, the end of Python's standard library;
--text gives other text. Speed is transformers' on this machine, where torchao's eager path is not made for CPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_prune.checkpoint.hf import read_config
from megatron_prune.checkpoint.run_export import model_directory
from megatron_prune.deployment.comparison import compare_precisions, precision_table
from megatron_prune.deployment.quantize import Calibration, check_target, quantize_export
from megatron_prune.deployment.texts import documents_or_held_out, token_batch, training_documents
from megatron_prune.errors import UserError
from megatron_prune.evaluation.cloze import make_questions, task_names
from megatron_prune.evaluation.offline import SEED
from megatron_prune.tool import beside, check_output, check_output_directory, files_of, run_tool

LENGTH = 256  # tokens of a sample, of text that is measured and of text that is calibrated with


def main(argv: Sequence[str] | None = None) -> int:
    """Quantise and compare; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face directory, or run directory")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: MODEL-int8")
    parser.add_argument("--smooth", action="store_true", help="move outliers from activations into weights first")
    parser.add_argument("--clip", action="store_true", help="cut weight rows where that brings outputs closer")
    parser.add_argument("--calibration-text", type=Path, nargs="+", default=[], metavar="FILE", help="for these two")
    parser.add_argument("--calibration-tokens", type=int, default=4096, help="of that text (default: 4096)")
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="held-out plain text")
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens for perplexity (default: 16384)")
    parser.add_argument("--questions", type=int, default=100, help="of each task of the offline suite (default: 100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here too")
    options = parser.parse_args(argv)
    return run_tool(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    for name in ("calibration_tokens", "tokens"):
        if getattr(options, name) < LENGTH:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} must be {LENGTH} or more")
    if options.questions < 0:
        raise UserError(f"--questions {options.questions} must be 0 or more")
    check_output("--json", options.json, files_of(options.model))
    if options.output is not None:
        check_output_directory("--output", options.output)
    export = model_directory(options.model)
    output = options.output or beside(export, "-int8")
    check_target(export, output)
    documents = documents_or_held_out(options.text)
    text = token_batch(export, documents, options.tokens // LENGTH, LENGTH, "give more --text or fewer --tokens")
    asked = task_names() if options.questions else ()
    tasks = {task: make_questions(task, documents, options.questions, SEED) for task in asked}
    report = quantize_export(export, output, _calibration(options, export))
    if report.smoothed is not None:
        print(
            f"smoothed {report.smoothed.num_scaled} of {report.smoothed.num_sites} activations; others were best left"
        )
    if report.clipped is not None:
        print(f"clipped {report.clipped:.1%} of the weight rows")
    print(f"{output}: W8A8, {report.num_bytes:,} bytes; measuring fp32, bf16 and int8 ...", flush=True)
    rows = compare_precisions(export, output, text, tasks, lambda name: print(f"  {name} measured", flush=True))
    print("\n".join(precision_table(rows)))
    config = read_config(export)
    stored = config.get("torch_dtype") or config.get("dtype") or "float32"
    if stored != "float32":
        print(f"{export} stores {stored}; fp32 is the same weights in twice the bytes, computed with in fp32")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


def _calibration(options: argparse.Namespace, export: Path) -> Calibration | None:
    if not (options.smooth or options.clip):
        if options.calibration_text:
            raise UserError("--calibration-text is for --smooth and --clip; add one of them")
        return None
    documents = training_documents(options.calibration_text)
    advice = "give more --calibration-text or fewer --calibration-tokens"
    tokens = token_batch(export, documents, options.calibration_tokens // LENGTH, LENGTH, advice)
    return Calibration(tokens, smooth=options.smooth, clip=options.clip)


if __name__ == "__main__":
    sys.exit(main())
