#!/usr/bin/env python
"""Write a checkpoint for another layout, or convert it to and from DeepSpeed's universal format.

    python tools/reshard_checkpoint.py runs/457m moved --tensor-model-parallel-size 2 --data-parallel-size 8
    python tools/reshard_checkpoint.py runs/457m --to-deepspeed-universal universal
    python tools/reshard_checkpoint.py --from-deepspeed-universal universal runs/back
    python tools/reshard_checkpoint.py runs/457m runs/back --from-deepspeed-universal universal

A run resumes under any layout from any checkpoint without this. It is for a cluster that should read only what is near,
and for dropping dead padding. SRC is a run directory (its newest complete checkpoint) or one step's directory, DST a
new run directory for --load. One process, no GPU, memory of a few times the largest tensor; states, ledger and counters
are kept bit for bit.

To DeepSpeed: engine.load_checkpoint("universal") with "checkpoint": {"load_universal": true} on this project's pipeline
module at the pruned shape, any PP and DP; for TP above 1 give --tensor-model-parallel-size. Pass
load_lr_scheduler_states=False if the engine has a scheduler. From DeepSpeed: of what DeepSpeed saved and converted
itself (ds_to_universal, TP 1), the two-path form takes the model, the ledger and the position in the data from SRC.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_prune.checkpoint.directory import SOURCE_DIR
from megatron_prune.checkpoint.inspect import find_step
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.checkpoint.reshard import SavedStates, copy_run_files, reshard, state_bytes
from megatron_prune.checkpoint.universal import UniversalCheckpoint, write_universal
from megatron_prune.errors import EXIT_BAD_INPUT, EXIT_FAILURE, MegatronPruneError, UserError
from megatron_prune.parallel.fragments import Layout

_MOST_CHANNELS = 1 << 62  # a larger alignment than any width is the same as that width


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("paths", type=Path, nargs="*", metavar="PATH", help="SRC and DST; see the examples above")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="T", help="default: 1")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="P", help="default: 1")
    parser.add_argument(
        "--data-parallel-size", type=int, default=1, metavar="D", help="copies of the model, default: 1"
    )
    parser.add_argument(
        "--prune-align", type=int, metavar="N", help="channels to align widths to (default: the run's; 1: no padding)"
    )
    parser.add_argument("--to-deepspeed-universal", type=Path, metavar="DIR", help="write DeepSpeed's format there")
    parser.add_argument("--from-deepspeed-universal", type=Path, metavar="DIR", help="take the tensors from there")
    options = parser.parse_args(argv)
    try:
        _convert(options)
    except MegatronPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILURE
    return 0


def _convert(options: argparse.Namespace) -> None:
    layout = _layout(options)
    source, target = _paths(options)
    step = None if source is None else find_step(source)
    saved: SavedStates | None = None if step is None else Checkpoint(step)
    if options.from_deepspeed_universal is not None:
        saved = UniversalCheckpoint(options.from_deepspeed_universal, saved)
    assert saved is not None
    quantum = _quantum(options, saved)
    with tqdm(total=state_bytes(saved), unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        if options.to_deepspeed_universal is not None:
            written = write_universal(saved, target, layout.tensor, quantum, bar.update)
        else:
            written = reshard(saved, target, layout, quantum, bar.update)
    if options.to_deepspeed_universal is None and step is not None:
        copy_run_files(step.parent.parent, target, [SOURCE_DIR])
    count = saved.manifest.partition.architecture().num_parameters()
    universal = options.to_deepspeed_universal is not None
    fits = f"TP{layout.tensor}, any PP and DP" if universal else str(layout)
    states = ", ".join(saved.kinds())
    print(f"{written}: step {saved.manifest.progress.step}, {count:,} parameters ({states}), for {fits}")


def _layout(options: argparse.Namespace) -> Layout:
    sizes = (options.tensor_model_parallel_size, options.pipeline_model_parallel_size, options.data_parallel_size)
    names = ("tensor-model-parallel-size", "pipeline-model-parallel-size", "data-parallel-size")
    for name, size in zip(names, sizes, strict=True):
        if size < 1:
            raise UserError(f"--{name} {size} must be 1 or more")
    layout = Layout(*sizes)
    if options.to_deepspeed_universal is not None and layout.pipeline * layout.data > 1:
        raise UserError(f"{layout}: a universal checkpoint is the same for any PP and DP; give only the tensor size")
    return layout


def _paths(options: argparse.Namespace) -> tuple[Path | None, Path]:
    """SRC, or None where a universal checkpoint has all there is to know, and where to write."""
    paths: list[Path] = options.paths
    to, origin = options.to_deepspeed_universal, options.from_deepspeed_universal
    if to is not None and origin is not None:
        raise UserError("--to-deepspeed-universal and --from-deepspeed-universal are both given; keep one")
    if to is not None:
        if len(paths) != 1:
            raise UserError(f"--to-deepspeed-universal takes one path, SRC, and {len(paths)} are given")
        return paths[0], to
    if origin is not None and len(paths) == 1:
        return None, paths[0]
    if len(paths) != 2:
        wanted = "two paths, SRC and DST" if origin is None else "DST, or SRC and DST"
        raise UserError(f"{len(paths)} paths are given where {wanted} belong; see --help")
    return paths[0], paths[1]


def _quantum(options: argparse.Namespace, saved: SavedStates) -> int:
    if options.prune_align is None:
        return max(1, saved.manifest.whole_setting("prune", "prune_align", 0, _MOST_CHANNELS))
    if options.prune_align < 1:
        raise UserError(f"--prune-align {options.prune_align} must be 1 or more")
    return int(options.prune_align)


if __name__ == "__main__":
    sys.exit(main())
