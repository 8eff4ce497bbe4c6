"""DeepSpeed's own loader reads what ``write_universal`` writes of a model in the middle of pruning, bit for bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from layout_runs import HERE, Cluster, Layout, Runs, Source

from megatron_prune.checkpoint.store import Checkpoint
from megatron_prune.checkpoint.universal import UniversalCheckpoint, write_universal
from megatron_prune.parallel.states import STATE_KINDS

SOURCE = Source(heads=6, kv_heads=3)
MIDDLE = 4  # steps, as in test_moves.py, whose run this is; the budget is met after 7


@pytest.mark.parametrize("layout", [Layout(), Layout(data=2), Layout(2, 2)], ids=str)
def test_deepspeed_loads_a_pruned_model(runs: Runs, cluster: Cluster, tmp_path: Path, layout: Layout) -> None:
    run = runs.get(SOURCE, Layout(), save_interval=MIDDLE, keep_last=9)
    path = run / "checkpoints" / f"step_{MIDDLE:08d}"
    checkpoint = Checkpoint(path)
    partition = checkpoint.manifest.partition
    arch = partition.architecture()
    assert arch.num_parameters() < partition.source.num_parameters()
    assert arch.num_query_groups % 2, "two ranks that need no copied KV head would not show how slices are made"
    write_universal(checkpoint, tmp_path, layout.tensor)

    arguments = [str(path), str(tmp_path), str(layout.tensor), str(layout.pipeline)]
    cluster.run(HERE / "universal_worker.py", arguments, layout.processes, tmp_path)
    lines = [line for rank in range(layout.processes) for line in (tmp_path / f"rank{rank}.txt").read_text().split()]
    sizes = {f"{kind}/{name}": 0 for name in checkpoint.specs() for kind in STATE_KINDS}
    for line in lines:
        name, numel = line.rsplit(":", 1)
        sizes[name] += int(numel)
    target = partition.spread(layout.tensor)
    for name, spec in checkpoint.specs().items():
        copies = layout.tensor * (2 if spec.name.startswith("model.embed") and layout.pipeline > 1 else 1)
        assert {sizes[f"{kind}/{name}"] for kind in STATE_KINDS} == {copies * math.prod(target.shape(spec))}, name

    back = UniversalCheckpoint(tmp_path)
    assert (back.manifest.progress, back.events) == (checkpoint.manifest.progress, checkpoint.events)
    for spec in checkpoint.specs().values():
        for kind in STATE_KINDS:
            assert torch.equal(back.live(spec, kind), checkpoint.live(spec, kind)), (kind, spec.name)
