#!/usr/bin/env python
"""Time models as their users will run them: stock transformers or llama.cpp, batch 1, prefill apart.

    python tools/benchmark_latency.py examples/demo/source runs/demo/export
    python tools/benchmark_latency.py examples/demo/source runs/demo/export --compile
    python tools/benchmark_latency.py runs/457m/exports/* --threads 1 2 4 8 --precision fp32 bf16 int8
    python tools/benchmark_latency.py --shape EfficientLLM-457M --shape Qwen2.5-0.5B --precision bf16
    python tools/benchmark_latency.py --shape hidden=1216,ffn=3008,heads=19,head_dim=64,layers=24,vocab=49152,tied=1
    python tools/benchmark_latency.py source-f16.gguf pruned-f16.gguf            # in llama.cpp
    python tools/benchmark_latency.py runs/457m/exports/* --plot latency.png

Ratios are against the first model. A shape has random weights: its speed is the real one. Numbers of threads beyond
the machine's cores are left out, and said. --compile runs each model without Python between its operators, which is
most of a small model's time otherwise; a compilation for every model, precision and number of threads takes from
seconds to minutes. --plot draws latency against the loss on held-out text, for a family of
exports that a run has written with --export-at; the text is the end of Python's standard library unless --text gives
another. With --predict RUN also what a run with a latency target expects of the first model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_prune.checkpoint.hf import read_architecture
from megatron_prune.deployment.compiled import no_trace_on_disk
from megatron_prune.deployment.contestants import PRECISIONS, Contestant, contestants
from megatron_prune.deployment.latency_table import (
    Timing,
    Workload,
    compiled,
    latency_table,
    paper_lines,
    thread_counts,
    time_all,
)
from megatron_prune.deployment.texts import documents_or_held_out, token_batch
from megatron_prune.errors import UserError
from megatron_prune.evaluation.scoring import validation_loss
from megatron_prune.tool import check_output, files_of, run_tool
from megatron_prune.training.latency import LATENCY_FILE, read_table

LOSS_SAMPLES, LOSS_LENGTH = 32, 256  # held-out tokens of --plot


def main(argv: Sequence[str] | None = None) -> int:
    """Time models; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("models", nargs="*", help="Hugging Face directories (8-bit ones too), or GGUF files")
    parser.add_argument("--shape", action="append", default=[], help="KEY=NUMBER,... or a name of the paper's Table 12")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument("--compile", action="store_true", help="compiled ahead of time (AOTInductor; needs C++)")
    parser.add_argument("--context", type=int, default=128, help="tokens of the prefill (default: 128)")
    parser.add_argument("--new-tokens", type=int, default=16, help="decoded tokens a round (default: 16)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved timings of everything (default: 5)")
    parser.add_argument("--predict", type=Path, metavar="RUN", help="run directory with a latency.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture of latency against held-out loss")
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="held-out text for --plot")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times here too")
    options = parser.parse_args(argv)
    return run_tool(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    for name in ("context", "new_tokens", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} must be 1 or more")
    if min(options.threads) < 1:
        raise UserError(f"--threads {min(options.threads)} must be 1 or more")
    if not options.models and not options.shape:
        raise UserError("nothing to time: give directories of models, or --shape")
    if options.plot is not None and (options.shape or any(model.endswith(".gguf") for model in options.models)):
        raise UserError(
            "--plot is about Hugging Face directories: neither a --shape nor a GGUF file has its loss measured"
        )
    inputs = [*map(Path, options.models), *files_of(*map(Path, options.models))]
    check_output("--json", options.json, inputs)
    check_output("--plot", options.plot, inputs)
    if options.plot is not None:
        _check_picture(options.plot)
    expected = None if options.predict is None else _expected(options.predict, options.models[:1])
    threads, beyond = thread_counts(options.threads)
    if beyond:
        print(f"left out: {', '.join(map(str, beyond))} threads are more than this machine has cores")
    if not threads:
        raise UserError(f"--threads {options.threads} are all more than this machine has cores; give fewer")
    tokens = options.context + options.new_tokens + 8
    entrants = list(contestants(options.models, options.shape, options.precision, tokens))
    timed = compiled(entrants, tokens, lambda line: print(line, flush=True)) if options.compile else entrants
    with no_trace_on_disk():
        timings = time_all(timed, threads, Workload(options.context, options.new_tokens, options.rounds), _progress())
    how = ", compiled ahead of time" if options.compile else ""
    print(f"prefill of {options.context} tokens, then a token at a time{how}; medians of {options.rounds} rounds")
    print("\n".join(latency_table(timings)))
    for line in [*paper_lines(timings), *([] if expected is None else [expected])]:
        print(line)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(timing) for timing in timings], indent=2) + "\n", encoding="utf-8")
    if options.plot is not None:
        _plot(entrants, timings, options)


def _check_picture(file: Path) -> None:
    """That matplotlib is there and can write such a file, before anything is timed."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as error:
        raise UserError("--plot needs matplotlib, which is not installed; run: pip install matplotlib") from error
    ending, known = file.suffix[1:].lower(), FigureCanvasBase.get_supported_filetypes()
    if ending and ending not in known:
        raise UserError(f"--plot {file} is no kind of picture; let its name end in one of {', '.join(sorted(known))}")


def _plot(entrants: Sequence[Contestant], timings: Sequence[Timing], options: argparse.Namespace) -> None:
    from megatron_prune.deployment.latency_plot import plot_family

    text = token_batch(Path(options.models[0]), documents_or_held_out(options.text), LOSS_SAMPLES, LOSS_LENGTH)
    losses = {(entrant.name, entrant.precision): validation_loss(entrant.model, text.split(1)) for entrant in entrants}
    for (name, precision), loss in losses.items():
        print(f"{name} {precision}: loss {loss:.4f} on held-out text")
    plot_family(timings, losses, options.plot)
    print(options.plot)


def _progress() -> Callable[[int, int], None]:
    """A line on a terminal with the time that is left."""
    start = time.monotonic()

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            left = (time.monotonic() - start) / done * (total - done)
            print(f"\rround {done}/{total}, {left:.0f} s left ", end="\n" if done == total else "", file=sys.stderr)

    return show


def _expected(run_dir: Path, models: Sequence[str]) -> str:
    table = read_table(run_dir)
    if table is None:
        raise UserError(f"--predict {run_dir} has no {LATENCY_FILE}; give a run that was started with a latency target")
    if not models:
        raise UserError("--predict is about the first model; give its directory")
    arch = read_architecture(Path(models[0]))
    widths = arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads
    asked = f"after {table.about['context']} tokens of context in {table.about['precision']}"
    return f"{table.milliseconds_of(*widths):.3f} ms a token expected of {models[0]} {asked}"


if __name__ == "__main__":
    sys.exit(main())
