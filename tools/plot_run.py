"""Draw a run: the paper's Figure 5, shape, loss and throughput as PNG, or everything on one page of HTML.

    python tools/plot_run.py runs/457m                     # writes runs/457m/plots/*.png
    python tools/plot_run.py runs/457m --output pictures
    python tools/plot_run.py runs/457m --html              # writes runs/457m/plots/run.html, and no PNG
    python tools/plot_run.py runs/457m --html run.html --watch 30

Works on a run in progress too. The page needs no server and no network: open the file in a browser, copy it, mail it.
Under --watch it is written again every so many seconds, and loads itself again, until the run ends.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_prune.errors import EXIT_BAD_INPUT, UserError
from megatron_prune.tool import EXIT_INTERRUPTED, check_output, files_of

HTML_FILE = "run.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, draw, print the paths.

    Returns:
        The exit code: 0; 2 when the directory is no run or matplotlib is missing; 130 on Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run's --save directory")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the PNGs go (default: RUN_DIR/plots)")
    parser.add_argument("--html", nargs="?", const="", metavar="FILE", help="a page (default: RUN_DIR/plots/run.html)")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="with --html: write it again while the run goes")
    options = parser.parse_args(arguments)
    try:
        if options.html is None:
            if options.watch is not None:
                raise UserError(f"--watch {options.watch:g} keeps an HTML page up to date; add --html")
            _draw(options.run_dir, options.output or options.run_dir / "plots")
        else:
            if options.output is not None:
                raise UserError(f"--output {options.output} is for PNGs and --html writes none; name the page's FILE")
            default = options.run_dir / "plots" / HTML_FILE
            _write_html(options.run_dir, Path(options.html) if options.html else default, options.watch)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
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


def _write_html(run_dir: Path, file: Path, seconds: float | None) -> None:
    """Once, or until the run ends."""
    from megatron_prune.report_page.page import write_page
    from megatron_prune.report_page.records import read_run

    if seconds is not None and not (math.isfinite(seconds) and seconds >= 1):
        raise UserError(f"--watch {seconds:g} must be a number of seconds, 1 or more")
    check_output("--html", file, files_of(run_dir))
    first = True
    while True:
        run = read_run(run_dir)
        try:
            write_page(run, file, seconds)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"--html {file} cannot be written ({why}); give another file") from error
        if first:
            print(file, flush=True)
        if seconds is None or run.state.name != "running":
            if seconds is not None:
                print(f"{run.state.name}: {run.state.why}")
            return
        first = False
        time.sleep(seconds)


if __name__ == "__main__":
    sys.exit(main())
