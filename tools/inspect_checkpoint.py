#!/usr/bin/env python
"""Say what a checkpoint holds: shape, parameters, progress to the target, last removals, layout and sizes.

    python tools/inspect_checkpoint.py runs/457m                              # the newest, and a list of all steps
    python tools/inspect_checkpoint.py runs/457m/checkpoints/step_00001000
    python tools/inspect_checkpoint.py runs/457m --verify                     # read every byte and compare checksums
    python tools/inspect_checkpoint.py runs/457m --json

Without --verify only manifests, ledgers and headers are read. Exit code 2 when something is damaged; a run that resumes
passes over a damaged checkpoint and takes the one before it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prune.errors import EXIT_BAD_INPUT, UserError
from megatron_prune.tool import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """Print; returns the exit code: 0, 2 for bad input and for damage, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="run directory (its newest step), or a step")
    parser.add_argument("--events", type=int, default=5, metavar="N", help="removals to list, the last (default: 5)")
    parser.add_argument("--verify", action="store_true", help="recompute all checksums and name what is damaged")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    return run_tool(lambda: _inspect(options))


def _inspect(options: argparse.Namespace) -> int:
    # Here, where Ctrl-C ends in one line: they take seconds.
    from megatron_prune.checkpoint.files import DamagedCheckpoint
    from megatron_prune.checkpoint.inspect import damages, describe, description_dict, find_step, run_steps
    from megatron_prune.checkpoint.inspect_text import format_description

    if options.events < 0:
        raise UserError(f"--events {options.events} must be 0 or more")
    steps = list(run_steps(options.path, options.verify))
    if not options.json:
        for name, state, why in steps:
            print(f"{name:24}{state}" + (f": {why}" if why else ""))
    path = find_step(options.path)
    damaged = list(damages(path)) if options.verify else []
    found = None
    if not damaged:  # what is may be what would be described
        try:
            found = describe(path)
        except DamagedCheckpoint as error:
            damaged = [error]
    if options.json:
        content: dict[str, Any] = {} if found is None else description_dict(found, options.events)
        content["steps"] = [dict(zip(("name", "state", "why"), row, strict=True)) for row in steps]
        content["damaged"] = {damage.file: damage.why for damage in damaged} if options.verify or damaged else None
        print(json.dumps(content))
    elif found is not None:
        print(format_description(found, options.events))
        if options.verify:
            print("  verified    every file has its checksum")
    for damage in damaged:
        print(f"error: {damage}", file=sys.stderr)
    return EXIT_BAD_INPUT if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
