#!/usr/bin/env python
"""What does a checkpoint cost: bytes, the time of a save, how long training stands still, and the time to read it back?

One process saves random states of a model with one stem channel in sixteen pruned and still in the tensors, as between
two compactions, and its peer writes the same tensors with torch.save, as they lie in memory; both wait for the disk.
The three ways take turns. A save in the background stops training twice: while its states are copied to host memory
(``copy``), and when the main thread completes what the writing thread has written (``complete``). Reading takes the
checksums of all files and then every state as the fragments of one rank.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from timing import (
    SECONDS_TO_MS,
    Cell,
    Spread,
    add_common_options,
    describe_machine,
    measure,
    positive_int,
    print_table,
    write_json,
)

from megatron_prune.architecture import Architecture, tensor_specs, uniform_kv_groups
from megatron_prune.checkpoint.directory import BYTES_PER_PARAMETER
from megatron_prune.checkpoint.manifest import Manifest, Progress
from megatron_prune.checkpoint.store import BackgroundSave, Checkpoint, HostMemory, save_checkpoint
from megatron_prune.parallel.mesh import Mesh, make_mesh
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.states import STATE_KINDS, StateFragment
from megatron_prune.pruning.groups import MiniGroup, remove

HEAD_DIM = 64
FFN_RATIO = 4
VOCAB_SIZE = 8192
PRUNED_EVERY = 16  # stem channels
POLL_SECONDS = 0.001

COLUMNS = (
    *("hidden", "live (M)", "MB", "bytes/12 per parameter", "save s", "MB/s", "save/torch.save"),
    *("copy ms", "complete ms", "stall/save", "read s"),
)


class Saver:
    """Saves one model's states again and again, each way.

    Args:
        hidden: of the source.
        layers: of the source.
        directory: for what is written.
        mesh: a group of one.
    """

    def __init__(self, hidden: int, layers: int, directory: Path, mesh: Mesh) -> None:
        heads = hidden // HEAD_DIM
        groups = uniform_kv_groups(layers, heads, heads)
        source = Architecture(
            "llama", layers, hidden, FFN_RATIO * hidden, heads, groups, HEAD_DIM, VOCAB_SIZE, tie_embeddings=True
        )
        partition = Partition.of(source)
        for channel in range(0, hidden, PRUNED_EVERY):
            partition = remove(partition, MiniGroup("stem", channel))
        self.partition = partition
        self._directory = directory
        self._mesh = mesh
        self._fragments = [
            StateFragment(spec, kind, 0, torch.rand(torch.Size(partition.shape(spec)).numel()))
            for spec in tensor_specs(source)
            for kind in STATE_KINDS
        ]
        self._memory = HostMemory()
        self._step = 0
        self.copies: list[float] = []
        self.completions: list[float] = []
        self.path = directory

    def foreground(self) -> None:
        """Save and wait."""
        self.path = save_checkpoint(
            self._directory, self._next_manifest(), [], self._fragments, self._mesh, keep_last=2
        )

    def background(self) -> None:
        """Save behind; notes the seconds for which training would have stood still."""
        manifest, began = self._next_manifest(), time.perf_counter()
        pending = BackgroundSave(self._directory, manifest, [], self._fragments, self._mesh, 2, self._memory)
        self.copies.append(time.perf_counter() - began)
        while not pending.written():
            time.sleep(POLL_SECONDS)
        began = time.perf_counter()
        self.path = pending.finish()
        self.completions.append(time.perf_counter() - began)

    def peer(self) -> None:
        """The same tensors with torch.save."""
        with (self._directory / "peer.pt").open("wb") as file:
            torch.save([fragment.values for fragment in self._fragments], file)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> None:
        """Verify the newest checkpoint and read all its states."""
        checkpoint = Checkpoint(self.path)
        for fragment in self._fragments:
            values = checkpoint.fragment(
                fragment.spec, fragment.kind, self.partition, 0, fragment.start, fragment.values.numel()
            )
            assert len(values) == len(fragment.values)

    def _next_manifest(self) -> Manifest:
        self._step += 1
        return Manifest(self.partition, Progress(step=self._step, adam_steps=self._step), {}, "random", {})


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print one line per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [256, 512, 1024]
    parser.add_argument(
        "--hidden", nargs="+", type=positive_int, default=sizes, help=f"multiples of {HEAD_DIM} (default {sizes})"
    )
    parser.add_argument("--layers", type=positive_int, default=4, help="decoder layers (default %(default)s)")
    parser.add_argument("--directory", type=Path, help="where to write; the disk it is on is what is measured")
    add_common_options(parser, rounds=5)
    options = parser.parse_args(argv)
    if any(hidden % HEAD_DIM for hidden in options.hidden):
        parser.error(f"--hidden {' '.join(map(str, options.hidden))}: give multiples of {HEAD_DIM}")
    print(f"{describe_machine()}; median (quartiles) of {options.rounds} rounds")
    rows = []
    for hidden in options.hidden:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            dist.init_process_group("gloo", f"file://{directory}/store", rank=0, world_size=1)
            saver = Saver(hidden, options.layers, Path(directory), make_mesh(torch.device("cpu")))
            rows.append(_row(hidden, saver, options.rounds))
            dist.destroy_process_group()
    print_table(COLUMNS, rows)
    write_json(options.json, "checkpoint", COLUMNS, rows)
    return 0


def _row(hidden: int, saver: Saver, rounds: int) -> list[Cell | Spread]:
    ways = {"save": saver.foreground, "behind": saver.background, "peer": saver.peer, "read": saver.read}
    measured = measure(ways, rounds)
    copies, completions = saver.copies[-rounds:], saver.completions[-rounds:]  # the first ones warmed up
    stalls = [
        (copy + complete) / save
        for copy, complete, save in zip(copies, completions, measured.seconds["save"], strict=True)
    ]
    live = saver.partition.architecture().num_parameters()
    size = sum(path.stat().st_size for path in saver.path.iterdir())
    seconds = statistics.median(measured.seconds["save"])
    return [
        *(hidden, live / 1e6, size / 1e6, f"{size / (BYTES_PER_PARAMETER * live):.4f}"),
        *(seconds, size / 1e6 / seconds, measured.ratio("save", "peer")),
        *(statistics.median(copies) * SECONDS_TO_MS, statistics.median(completions) * SECONDS_TO_MS),
        *(Spread.of(stalls), statistics.median(measured.seconds["read"])),
    ]


if __name__ == "__main__":
    sys.exit(main())
