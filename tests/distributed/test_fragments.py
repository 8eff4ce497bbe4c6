"""The private DeepSpeed attributes we read hold what its public accessors say, also after an upgrade."""

from __future__ import annotations

from pathlib import Path

import pytest
from layout_runs import HERE, Cluster, Layout, Runs, Source

from megatron_prune.architecture import tensor_specs
from megatron_prune.checkpoint.hf import read_architecture

TIED, UNTIED = Source(heads=6, kv_heads=3), Source(heads=6, kv_heads=3, tied=False)
CASES = [
    ("fp32", Layout(data=2), TIED),
    ("fp32", Layout(2, 2), TIED),
    ("fp32", Layout(2, 2, 2, True), TIED),
    ("bf16", Layout(), TIED),
    ("bf16", Layout(), UNTIED),
    ("bf16", Layout(2), TIED),
    ("bf16", Layout(2, sequence_parallel=True), TIED),
    ("bf16", Layout(pipeline=2), TIED),
    ("bf16", Layout(data=2), TIED),
    ("bf16", Layout(2, 2), TIED),
    ("bf16", Layout(2, 2, sequence_parallel=True), TIED),
    ("bf16", Layout(2, 1, 2), TIED),
    ("bf16", Layout(2, 1, 2, True), TIED),
    ("bf16", Layout(1, 2, 2), TIED),
    ("bf16", Layout(2, 2, 2), TIED),
    ("bf16", Layout(2, 2, 2, True), TIED),
]


@pytest.mark.parametrize(("precision", "layout", "source"), CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_fragments_match_the_safe_api(
    runs: Runs, cluster: Cluster, tmp_path: Path, precision: str, layout: Layout, source: Source
) -> None:
    flags = runs.flags(source, layout, tmp_path, precision=precision, eval_interval=0)
    cluster.run(HERE / "fragments_worker.py", flags, layout.processes, tmp_path)
    reports = [(tmp_path / f"rank{rank}.txt").read_text().splitlines() for rank in range(layout.processes)]
    names = [spec.name for spec in tensor_specs(read_architecture(runs.source(source)))]
    outputs = [name for name in names if name.endswith(("o_proj.weight", "down_proj.weight"))]
    copies = layout.tensor * layout.data  # ranks of a stage
    expected = [f"grad/{name}" for name in outputs] * 2  # in two steps
    if precision == "bf16":
        copy = ["model.embed_tokens.weight"] if source.tied and layout.pipeline > 1 else []  # of the last stage
        expected += [f"sum/{name}" for name in (*names, *copy)] * 2
    expected += [f"{kind}/{name}" for name in names for kind in ("master", "exp_avg", "exp_avg_sq")]
    assert sorted(line for report in reports for line in report) == sorted(expected * copies)
