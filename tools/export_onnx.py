#!/usr/bin/env python
"""Write an export as ONNX and compare it with transformers in onnxruntime.

    python tools/export_onnx.py runs/demo/export               # writes runs/demo/export.onnx
    python tools/export_onnx.py runs/457m --output 457m.onnx

Takes a Hugging Face directory or a run directory, whose newest checkpoint is exported first. The file maps input_ids
[batch, length] to logits, both dimensions free, in fp32 and without a KV cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prune.checkpoint.run_export import model_directory
from megatron_prune.deployment.onnx_export import export_onnx
from megatron_prune.tool import beside, check_output, files_of, run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """Export; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face directory, or run directory")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: MODEL.onnx")
    options = parser.parse_args(argv)
    return run_tool(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    check_output("--output", options.output, files_of(options.model))
    directory = model_directory(options.model)
    report = export_onnx(directory, options.output or beside(directory, ".onnx"))
    print(
        f"{report.file}: the most likely token is equal at all {report.positions} positions in onnxruntime, logits "
        f"within {report.max_abs_logit_difference:.1e} of transformers'"
    )


if __name__ == "__main__":
    sys.exit(main())
