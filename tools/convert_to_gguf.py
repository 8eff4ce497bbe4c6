#!/usr/bin/env python
"""Convert an export to GGUF by llama.cpp's own converter, and compare what the two write.

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.16 && tar xf llama_cpp_python-0.3.16.tar.gz
    python tools/convert_to_gguf.py runs/demo/export --llama-cpp llama_cpp_python-0.3.16
    python tools/convert_to_gguf.py runs/demo/export --llama-cpp llama_cpp_python-0.3.16 --check 64

Takes a Hugging Face directory or a run directory, whose newest checkpoint is exported first. Names the pre-tokenizer of
a BPE vocabulary that llama.cpp does not know. --check N has llama.cpp (by the package llama-cpp-python) and
transformers continue a few prompts by N tokens each; the exit code is 1 unless all are equal. docs/deploy.md says how
to build it. What becomes of a shape beforehand: tools/convert_to_hf.py --check-targets llama.cpp.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prune.checkpoint.run_export import model_directory
from megatron_prune.deployment.gguf import OUTTYPES, compare_greedy, convert, require_llama_cpp
from megatron_prune.errors import EXIT_FAILURE, UserError
from megatron_prune.tool import beside, check_output, files_of, run_tool

PROMPTS = ("def read_lines(path):\n    ", "import os\nimport sys\n\nclass ", "The quick brown fox")


def main(argv: Sequence[str] | None = None) -> int:
    """Convert and compare; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face directory, or run directory")
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="DIR", help="its source tree")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: MODEL-TYPE.gguf")
    parser.add_argument("--outtype", choices=OUTTYPES, default="f16")
    parser.add_argument("--pre-tokenizer", metavar="NAME", help="llama.cpp's name of it; default: from tokenizer.json")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="compare N greedy tokens a prompt")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="for --check; may be repeated")
    options = parser.parse_args(argv)
    return run_tool(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.check < 0:
        raise UserError(f"--check {options.check} must be 0 or more")
    if options.prompt is not None and not (options.check and all(options.prompt)):
        raise UserError("--prompt TEXT is some text for --check N to continue; give both")
    if options.check:
        require_llama_cpp("--check")
    check_output("--output", options.output, files_of(options.model))
    directory = model_directory(options.model)
    output = options.output or beside(directory, f"-{options.outtype}.gguf")
    named = convert(directory, options.llama_cpp, output, options.outtype, options.pre_tokenizer)
    print(f"{output}: {options.outtype}, pre-tokenizer {named}")
    if not options.check:
        return 0
    worst = 0
    for result in compare_greedy(directory, output, options.prompt or PROMPTS, options.check):
        tokens = "the same tokens" if result.same_prompt else "OTHER TOKENS"
        print(f"{result.prompt!r}: {tokens}, {result.equal} of {result.tokens} greedy tokens equal")
        worst = max(worst, result.tokens - result.equal, not result.same_prompt)
    return EXIT_FAILURE if worst else 0


if __name__ == "__main__":
    sys.exit(main())
