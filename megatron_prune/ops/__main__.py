"""``python -m megatron_prune.ops``: which kernels a run on this machine would use, and why."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import torch

from megatron_prune.errors import EXIT_BAD_INPUT, UserError
from megatron_prune.ops.dispatch import build_ops, format_choices, parse_forced
from megatron_prune.ops.saliency import describe_modules


def main(arguments: Sequence[str] | None = None) -> int:
    """Print PyTorch's version, the device, the table of operations and what became of the compiled modules.

    Returns:
        The exit code: 0, or 2 when a forced implementation cannot be had.
    """
    parser = argparse.ArgumentParser(prog="python -m megatron_prune.ops", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--force", nargs="+", default=[], metavar="OP=IMPLEMENTATION", help="use this implementation or fail"
    )
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        ops = build_ops(parse_forced(options.force), device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"torch {torch.__version__}, python {platform.python_version()}, {_describe(device)}\n")
    print(format_choices(ops))
    print("\n" + "\n".join(describe_modules()))
    return 0


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    return f"cuda {torch.version.cuda}, {torch.cuda.device_count()} x {properties.name} (sm {capability})"


if __name__ == "__main__":
    sys.exit(main())
