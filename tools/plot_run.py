"""Draw a run: saliency (the paper's Figure 5), shape, loss and throughput, as PNG.

    python tools/plot_run.py runs/457m                    # writes runs/457m/plots/*.png
    python tools/plot_run.py runs/457m --output pictures

Works on a run in progress too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prune.errors import EXIT_BAD_INPUT, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, draw, print the paths.

    Returns:
        The exit code: 0, or 2 when the directory is no run or matplotlib is missing.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run's --save directory")
    parser.add_argument("--output", type=Path, default=None, metavar="DIR", help="default: RUN_DIR/plots")
    options = parser.parse_args(arguments)
    try:
        _draw(options.run_dir, options.output or options.run_dir / "plots")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _draw(run_dir: Path, output: Path) -> None:
    try:
        from megatron_prune.plotting import plot_run, read_run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise UserError("plots need matplotlib, which is not installed; run: pip install matplotlib") from error
    records = read_run(run_dir)
    if not records.events:
        print("nothing was pruned in this run: no saliency and no shape to draw")
    for path in plot_run(records, output):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
