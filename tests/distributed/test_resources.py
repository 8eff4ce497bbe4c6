"""What compactions leave behind and decisions send, on TP2·PP2·DP2."""

from __future__ import annotations

import json
from typing import Any

import pytest
from layout_runs import HERE, Layout, Runs, Source

LAYOUT = Layout(tensor=2, pipeline=2, data=2)
FP32 = 4
MINIMA = 4  # numbers per layer a stage tells the others: a head and its score, a channel and its score
RESIDENT_SLACK = 8 << 20  # bytes; a leaked engine shows in the count of engines long before


@pytest.fixture(scope="module")
def ranks(runs: Runs) -> list[dict[str, Any]]:
    """Every rank's report of a run that cuts its tensors after every step that prunes."""
    directory = runs.root / "resources"
    directory.mkdir()
    changes = {"prune_ratio": "2:1", "prune_align": 1, "train_iters": 24, "target_shape": "hidden=8,ffn=8,heads=2"}
    flags = runs.flags(Source(6, 3), LAYOUT, directory, **changes)
    runs.cluster.run(HERE / "resources_worker.py", flags, LAYOUT.processes, directory)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(LAYOUT.processes)]


def test_twenty_compactions_leave_nothing_behind(ranks: list[dict[str, Any]]) -> None:
    for rank, report in enumerate(ranks):
        seen = report["resources"]
        assert len(seen) >= 20
        for name in ("process_groups", "descriptors", "threads", "engines"):
            # The first compactions warm up: gloo connects a pair of ranks when it first needs the pair.
            counts = {entry[name] for entry in seen[2:]}
            assert len(counts) == 1, f"{name} of rank {rank}: {[entry[name] for entry in seen]}"
        assert {entry["engines"] for entry in seen} == {1}
        grown = seen[-1]["resident"] - seen[2]["resident"]
        assert grown < RESIDENT_SLACK, f"rank {rank} grew by {grown} bytes in {len(seen)} compactions"


def test_a_compaction_holds_one_whole_parameter_at_a_time(ranks: list[dict[str, Any]]) -> None:
    """Beyond the old shard: the new one, DeepSpeed's flat copy of its parameters, and one unsharded parameter.

    With ``P`` parameters on a rank, ``F`` of them in its optimizer fragments and ``L`` in the largest tensor, all ranks
    together: ``4 (2 P + 3 F + L)`` bytes. On a loaded machine gloo's thread may hold a finished sum for a moment longer
    than it is needed: one compaction of a rank may be above that for it, by no more than another ``L``.
    """
    for rank, report in enumerate(ranks):
        above = []
        for sizes in report["peaks"]:
            shard = 2 * sizes["new_parameters"] + 3 * sizes["new_fragments"]
            allowed = FP32 * (shard + sizes["largest"])
            above += [(sizes, allowed)] if sizes["peak"] > allowed else []
            assert 0 < sizes["peak"] <= allowed + FP32 * sizes["largest"], f"rank {rank}: {sizes}, allowed {allowed}"
            # A second one would be lost in the slack of the formula, since DeepSpeed's own peak comes later.
            assert sizes["whole_tensors"] == 1, f"rank {rank}: {sizes}"
        assert len(above) <= 1, f"rank {rank}: {above}"


def test_a_decision_sends_vectors_only(ranks: list[dict[str, Any]]) -> None:
    """8 (h + ff) bytes per layer within a stage, 8 d over all ranks, the minima of each layer, and the choice."""
    for report in ranks:
        assert len(report["decisions"]) >= 20
        for decision in report["decisions"]:
            per_layer = decision["heads"] + decision["ffn"]
            vectors = [
                {"name": "all_reduce", "numel": decision["layers"] * per_layer, "dtype": "float64", "ranks": 4},
                {"name": "all_reduce", "numel": decision["stem"], "dtype": "float64", "ranks": 8},
            ]
            choice = [
                {"name": "all_reduce", "numel": MINIMA * decision["all_layers"], "dtype": "float64", "ranks": 2},
                {"name": "broadcast_object_list", "numel": None, "dtype": None, "ranks": 8},
                {"name": "all_reduce", "numel": 1, "dtype": "int64", "ranks": 8},  # does any rank disagree?
            ]
            assert decision["groups"] > 0
            assert decision["calls"] == vectors + choice * decision["groups"]
