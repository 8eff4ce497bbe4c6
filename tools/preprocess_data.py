#!/usr/bin/env python
"""Turn text into the token files that pretrain_prune.py reads (Megatron's .bin and .idx)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_prune.data.documents import find_inputs, stdlib_files
from megatron_prune.data.preprocess import preprocess
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.errors import EXIT_BAD_INPUT, MegatronPruneError, UserError

_EPILOG = """\
input files, by their suffix:
  .jsonl .json .ndjson   one JSON object per line, the text under --json-key; also with .gz or .zst
  .parquet               the text in the column --json-key
  anything else          one UTF-8 document per file

examples:
  # parquet shards with the source model's own tokenizer, 16 processes
  python tools/preprocess_data.py --input 'shards/*.parquet' --tokenizer /models/SmolLM-1.7B \\
      --output-prefix data/fineweb --workers 16

  # compressed JSON lines, text under "content", a sentencepiece model
  python tools/preprocess_data.py --input 'dump/**/*.jsonl.zst' --json-key content \\
      --tokenizer /models/llama/tokenizer.model --output-prefix data/code --workers 8

  # Python's standard library: real text on every machine, nothing to download
  python tools/preprocess_data.py --stdlib --tokenizer DIR --output-prefix data/stdlib

An end-of-document token follows every document. If a run is interrupted, the same command continues it; if the output
is complete already, it says so and does nothing. Train on the result with --data-path OUTPUT_PREFIX.
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="GLOB", help="files or quoted patterns; ** crosses directories")
    source.add_argument("--stdlib", action="store_true", help="the running Python's standard library")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="Hugging Face directory or hub id, tokenizer.json, or sentencepiece .model; use the source model's",
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: the CPUs this process may use, %(default)s); the result is the same for any N",
    )
    parser.add_argument("--json-key", default="text", metavar="KEY", help="field or column of the text (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    args = parse_args(argv)
    try:
        files = stdlib_files() if args.stdlib else find_inputs(args.input)
        tokenizer = load_tokenizer(args.tokenizer)
        result = preprocess(
            files,
            tokenizer,
            args.output_prefix,
            workers=args.workers,
            json_key=args.json_key,
            overwrite=args.overwrite,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except MegatronPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 1
    size = f"{result.documents:,} documents, {result.tokens:,} tokens"
    if result.already_complete:
        print(f"{args.output_prefix} is already complete: {size} (--overwrite makes it again)")
        return 0
    reused = f", {result.reused} of {result.shards} shards from an earlier run" if result.reused else ""
    print(f"wrote {args.output_prefix}.bin and .idx: {size}, vocabulary {tokenizer.vocab_size:,}{reused}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
