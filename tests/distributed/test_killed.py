"""A killed run that is started again ends as if nothing had happened; kill_campaign.py does this at random."""

from __future__ import annotations

import pytest
from kill_campaign import LAYOUTS, WAYS_TO_SAVE, Campaign, Kill
from layout_runs import Layout, Runs

#: In the order in which a run comes to them, so that each start gets further than the one before.
KILLS = (
    Kill(0, "states moving", 40),
    Kill(1, "decision", 2),
    Kill(1, "shard begun", 1),
    Kill(0, "file synced", 2),  # the marker is there, the name is not
    Kill(0, "zeroing", 90),
    Kill(0, "after a rename", 1),
    Kill(0, "exported", 1),
    Kill(1, "compaction", 2),
    Kill(0, "metrics", 5),
)


@pytest.fixture(scope="module")
def campaign(runs: Runs) -> Campaign:
    return Campaign(runs)


@pytest.mark.parametrize(("layout", "words"), list(zip(LAYOUTS, WAYS_TO_SAVE, strict=True)), ids=str)
def test_nothing_tells_that_a_run_was_killed(
    campaign: Campaign, runs: Runs, layout: Layout, words: tuple[str, ...]
) -> None:
    directory = runs.root / f"killed-{layout}"
    for kill in KILLS:
        assert not campaign.start(directory, layout, kill, *words), f"{kill} was never come to"
    assert campaign.start(directory, layout, None, *words)
    campaign.check(directory, layout)
