#!/usr/bin/env python
"""The paper's comparisons in miniature: train small sources on the standard library's text, prune and train them in
every way there is, and write docs/study.md from the results.

    python tools/study.py --jobs 2
    python tools/study.py --only small/unified small/few-shot --seeds 1     # some runs and what they need; no page
    python tools/study.py --from-results examples/study/results.json        # the page again, without any run

Every run's result is kept under --runs, so an interrupted study continues and a finished one only writes the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prune.errors import EXIT_BAD_INPUT, EXIT_FAILURE, MegatronPruneError, UserError
from megatron_prune.study.document import write_page
from megatron_prune.study.heldout import data_hash, prepare_text
from megatron_prune.study.results import collect, read_results, write_results
from megatron_prune.study.runs import all_runs, chosen_runs
from megatron_prune.study.settings import read_study
from megatron_prune.study.workers import execute_runs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code: 0, 2 for bad input, 130 when interrupted, 1 for runs that failed."""
    options = _parse(argv)
    # A batch system's way to end a program should end the workers too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.from_results is None:
            _study(options)
        else:
            write_page(read_results(options.from_results), options.docs)
    except MegatronPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILURE
    except KeyboardInterrupt:
        print("interrupted; the same command continues with the runs that have no result yet", file=sys.stderr)
        return 130
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", type=Path, default=Path("examples/study/study.yaml"), metavar="FILE", help="%(default)s")
    add("--runs", type=Path, default=Path("runs/study"), metavar="DIR", help="where runs go (%(default)s)")
    add("--jobs", type=int, default=2, metavar="N", help="runs at once, of one thread each (%(default)s)")
    add("--only", nargs="+", default=[], metavar="KEY", help="runs whose SOURCE/ROW/SEED begins with this")
    add("--seeds", type=int, nargs="+", metavar="S", help="in place of the file's")
    add("--docs", type=Path, default=Path("docs"), metavar="DIR", help="where study.md goes (%(default)s)")
    add("--results", type=Path, metavar="FILE", help="keep all results here (RUNS/results.json)")
    add("--from-results", type=Path, metavar="FILE", help="write the page from such a file and run nothing")
    return parser.parse_args(argv)


def _study(options: argparse.Namespace) -> None:
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs} must be 1 or more")
    study = read_study(options.config)
    if options.seeds:
        study = dataclasses.replace(study, seeds=tuple(options.seeds))
    prefix = prepare_text(study, options.runs)
    runs = chosen_runs(all_runs(study, data_hash(prefix), options.runs), options.only)
    print(f"{len(runs)} runs below {options.runs}, {options.jobs} at once", flush=True)
    execute_runs(runs, prefix, options.jobs)
    if options.only:
        return
    results = collect(study, runs)
    target = options.results or options.runs / "results.json"
    write_results(results, target)
    print(f"wrote {target} and {write_page(read_results(target), options.docs)}")


if __name__ == "__main__":
    sys.exit(main())
