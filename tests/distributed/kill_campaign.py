"""Kills a run again and again and starts it again each time; in the end nothing may tell.

``python tests/distributed/kill_campaign.py --kills 50`` draws ranks and places at random and takes minutes;
test_killed.py does a few chosen ones. Equal to the bit must be the losses, gradient norms and validation losses, the
ledger, the weights and moments of the last checkpoint, and the export written on the way.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from kill_worker import MOMENT, MOMENTS, PLACES
from layout_runs import HERE, Cluster, Layout, Runs, Source, lines
from safetensors.torch import load_file
from tqdm import tqdm

from megatron_prune.checkpoint.store import CHECKPOINTS, Checkpoint, newest_checkpoint

SOURCE = Source(heads=6, kv_heads=3)
LAYOUTS = (Layout(data=2), Layout(tensor=2, pipeline=2))
EXPORT = "20K"
CHANGES = {"save_interval": 3, "eval_interval": 4, "export_at": EXPORT}
WAYS_TO_SAVE: tuple[tuple[str, ...], ...] = ((), ("--async-save",))
_TIMING = ("tokens_per_second", "mfu")
_ATTEMPTS = 200  # of one run; each kill costs at most the steps since the last checkpoint


@dataclasses.dataclass(frozen=True)
class Kill:
    """Where a process dies."""

    rank: int
    place: str
    call: int


class Campaign:
    """Runs of one source, whole ones and killed ones.

    Args:
        runs: makes them.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._whole: dict[Layout, Path] = {}

    def whole(self, layout: Layout) -> Path:
        """The run that nobody disturbs."""
        if layout not in self._whole:
            directory = self._runs.root / f"whole-{layout}"
            self.start(directory, layout, None)
            self._whole[layout] = directory
        return self._whole[layout]

    def start(self, directory: Path, layout: Layout, kill: Kill | None, *words: str) -> bool:
        """Start a run, or start it again.

        Returns:
            False if it was killed.

        Raises:
            AssertionError: it ended otherwise than by being killed or finishing.
        """
        directory.mkdir(exist_ok=True)
        flags = [*self._runs.flags(SOURCE, layout, directory, **CHANGES), *words]
        victim = Kill(-1, MOMENT, 0) if kill is None else kill
        arguments = [str(victim.rank), victim.place, str(victim.call), *flags]
        try:
            self._runs.cluster.run(HERE / "kill_worker.py", arguments, layout.processes, directory)
        except AssertionError as error:
            # The launcher names who died first; with the others it does what a scheduler does.
            if not str(error).startswith(f"rank {victim.rank} of") or "Error" in str(error):
                raise
            return False
        return True

    def check(self, directory: Path, layout: Layout) -> None:
        """Compare a finished run with the one that nobody disturbed.

        Raises:
            AssertionError: they differ, or something is left behind.
        """
        whole = self.whole(layout)
        for mine, other in zip(*(metrics(run) for run in (directory, whole)), strict=True):
            assert mine == other
        assert (directory / "ledger.jsonl").read_text() == (whole / "ledger.jsonl").read_text()
        for read in (states, snapshot):
            ours, theirs = read(directory), read(whole)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        names = {path.name for path in (directory / CHECKPOINTS).iterdir()}
        assert names == {path.name for path in (whole / CHECKPOINTS).iterdir()}, "something is left behind"


def metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics without what the clock decides."""
    return [{k: v for k, v in line.items() if k not in _TIMING} for line in lines(run / "metrics.jsonl")]


def snapshot(run: Path) -> dict[str, torch.Tensor]:
    """Tensors of the export; safetensors writes its metadata in any order, so bytes would differ."""
    return load_file(run / "exports" / EXPORT / "model.safetensors")


def states(run: Path) -> dict[str, torch.Tensor]:
    """Every live weight and moment of a run's newest checkpoint."""
    path = newest_checkpoint(run)
    assert path is not None
    checkpoint = Checkpoint(path)
    return {
        f"{kind}/{name}": checkpoint.live(spec, kind)
        for kind in checkpoint.kinds()
        for name, spec in checkpoint.specs().items()
    }


def random_kills(draw: random.Random, layout: Layout) -> Iterator[Kill]:
    """Places in equal shares with moments of the clock."""
    while True:
        rank = draw.randrange(layout.processes)
        if draw.random() < 1 / 3:
            yield Kill(rank, MOMENT, draw.randrange(MOMENTS))
            continue
        place = draw.choice(list(PLACES))
        yield Kill(rank, place, draw.randint(1, PLACES[place][3]))


def main() -> int:
    """Run the campaign and print what was killed where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="kills on every layout")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    draw, cluster = random.Random(chosen.seed), Cluster()
    try:
        with tempfile.TemporaryDirectory() as folder:
            campaign = Campaign(Runs(Path(folder), cluster))
            for layout in LAYOUTS:
                _campaign_on(campaign, layout, chosen.kills, draw, Path(folder))
    finally:
        cluster.close()
    return 0


def _campaign_on(campaign: Campaign, layout: Layout, wanted: int, draw: random.Random, folder: Path) -> None:
    killed: collections.Counter[str] = collections.Counter()
    rounds = 0
    campaign.whole(layout)
    with tqdm(total=wanted, desc=f"kills on {layout}") as bar:
        while killed.total() < wanted:
            directory = folder / f"killed-{layout}-{rounds}"
            for kill, _ in zip(random_kills(draw, layout), range(_ATTEMPTS), strict=False):
                if campaign.start(directory, layout, kill, *draw.choice(WAYS_TO_SAVE)):
                    break
                killed[kill.place] += 1
                bar.update()
            else:
                raise AssertionError(f"{directory} did not finish in {_ATTEMPTS} attempts")
            campaign.check(directory, layout)
            rounds += 1
    places = ", ".join(f"{place} {count}" for place, count in sorted(killed.items()))
    print(f"{layout}: {killed.total()} kills in {rounds} runs, all equal to the bit to one that ran through ({places})")


if __name__ == "__main__":
    sys.exit(main())
