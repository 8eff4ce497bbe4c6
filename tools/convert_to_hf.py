#!/usr/bin/env python
"""Export a run's newest checkpoint as a Hugging Face model that stock transformers loads.

    python tools/convert_to_hf.py --load runs/457m --save exported/457m
    python tools/convert_to_hf.py --load runs/457m --check-targets vllm,llama.cpp
    python tools/convert_to_hf.py --shape hidden=1195,ffn=3006,heads=19,head_dim=64,layers=24,vocab=49152,tied=1 \\
        --check-targets vllm,llama.cpp,transformers,onnx

The export is reloaded and compared with the checkpoint, weights bit for bit and logits in fp32, before it is called
done. Tokenizer and token ids come with it. --check-targets says what other runtimes accept of a shape, at which tensor
parallel size and in which quantisation, for a run, an exported directory or a --shape, and writes nothing unless --save
is given too.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prune.architecture import Architecture
from megatron_prune.checkpoint.hf import read_architecture
from megatron_prune.checkpoint.hf_source import CONFIG_FILE
from megatron_prune.checkpoint.run_export import DTYPES, MAX_SHARD_BYTES, export_run
from megatron_prune.checkpoint.store import Checkpoint, newest_checkpoint
from megatron_prune.config.values import parse_source_shape
from megatron_prune.deployment.runtimes import check_targets, report, runtime_names
from megatron_prune.errors import UserError
from megatron_prune.tool import check_output_directory, run_tool

BYTES_PER_GB = 10**9


def main(argv: Sequence[str] | None = None) -> int:
    """Export; returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", type=Path, metavar="RUN", help="run directory (what --save was)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="where the model goes")
    parser.add_argument("--check-targets", metavar="NAME,...", help=f"of {', '.join(runtime_names())}")
    parser.add_argument("--shape", metavar="KEY=N,...", help="for --check-targets: a shape instead of a run")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the stored weights; default: the run's precision")
    parser.add_argument("--max-shard-gb", type=float, help="largest weights file in GB (default: 5)")
    options = parser.parse_args(argv)
    return run_tool(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    checked = options.check_targets is not None
    if options.load is None and not (checked and options.shape):
        raise UserError("--load is missing; give a run directory (what --save was)")
    if options.shape is not None and (options.load is not None or not checked):
        raise UserError("--shape is for --check-targets, in place of --load")
    if options.shape is not None and options.save is not None:
        raise UserError(f"--save {options.save} has nothing to write: --shape is no run; drop one of them")
    if options.save is None and not checked:
        raise UserError("--save is missing; give the directory that the model goes to")
    for flag, value in (("--dtype", options.dtype), ("--max-shard-gb", options.max_shard_gb)):
        if options.save is None and value is not None:
            raise UserError(f"{flag} {value} has no effect without --save; drop it, or say where the model goes")
    max_shard_bytes = _shard_bytes(options.max_shard_gb)
    if options.save is not None:
        check_output_directory("--save", options.save)
    if checked:
        names = [name.strip() for name in options.check_targets.split(",") if name.strip()]
        if not names:
            raise UserError(f"--check-targets names no runtime; there are {', '.join(runtime_names())}")
        arch = parse_source_shape(options.shape) if options.shape else _architecture(options.load)
        print("\n".join(report(check_targets(arch, names))))
    if options.save is not None:
        _export(options.load, options.save, options.dtype, max_shard_bytes)


def _shard_bytes(gigabytes: float | None) -> int:
    if gigabytes is None:
        return MAX_SHARD_BYTES
    if not (math.isfinite(gigabytes) and gigabytes * BYTES_PER_GB >= 1):
        raise UserError(f"--max-shard-gb {gigabytes} must be above 0 and finite; the default of 5 suits most hubs")
    return int(gigabytes * BYTES_PER_GB)


def _architecture(path: Path) -> Architecture:
    """Of an exported directory, or of a run's newest checkpoint."""
    if (path / CONFIG_FILE).is_file():
        return read_architecture(path)
    newest = newest_checkpoint(path)
    if newest is None:
        raise UserError(f"--load {path} holds no complete checkpoint; give the directory that was --save of a run")
    return Checkpoint(newest).manifest.partition.architecture()


def _export(run_dir: Path, directory: Path, dtype: str | None, max_shard_bytes: int) -> None:
    done = export_run(run_dir, directory, dtype, max_shard_bytes)
    exported, verified, arch = done.report, done.verified, done.architecture
    print(
        f"{directory}: {exported.hf_class}, {exported.num_parameters:,} parameters in {exported.dtype}, "
        f"hidden {arch.hidden_size}, ffn {arch.ffn_hidden_size}, heads {arch.num_attention_heads} (step {done.step})"
    )
    if exported.expanded_kv:
        print("K/V heads were repeated, one per query head: stock GQA cannot express groups of different size")
    print(
        f"verified: {verified.num_tensors} tensors equal bit for bit, logits within "
        f"{verified.max_abs_logit_difference:.1e} of transformers'"
    )


if __name__ == "__main__":
    sys.exit(main())
