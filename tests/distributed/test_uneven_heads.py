"""Head counts that tensor parallelism does not divide, and fewer KV heads than ranks, down to a loadable export."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from layout_runs import (
    Layout,
    Runs,
    Source,
    assert_same_curves,
    assert_same_decisions,
    assert_same_weights,
    exported_weights,
    lines,
    witnessed,
)

CASES = [
    (Source(heads=7, kv_heads=7), Layout(2)),
    (Source(heads=5, kv_heads=5), Layout(2)),
    (Source(heads=5, kv_heads=5), Layout(3)),
    (Source(heads=6, kv_heads=1), Layout(3)),
    (Source(heads=6, kv_heads=2), Layout(3)),
    (Source(heads=5, kv_heads=1, tied=False), Layout(3, sequence_parallel=True)),
]
FEWER = {"target_shape": "hidden=24,ffn=20,heads=2"}  # fewer heads than three ranks in the end


@pytest.mark.parametrize(("source", "layout"), CASES, ids=[f"{source}-{layout}" for source, layout in CASES])
def test_uneven_heads_equal_one_process(
    runs: Runs, source: Source, layout: Layout, tmp_path: Path, repo_root: Path
) -> None:
    baseline = runs.get(source, Layout(), **FEWER)
    run = runs.get(source, layout, **FEWER)
    assert lines(run / "ledger.jsonl")[-1]["shape"]["num_attention_heads"] == 2
    assert_same_decisions(run, baseline)
    assert_same_curves(run, baseline)
    assert_same_weights(run, baseline)
    assert all(len(rank["compactions"]) >= 3 for rank in witnessed(run))
    assert_exports(run, tmp_path / "exported", repo_root)


def assert_exports(run: Path, directory: Path, repo_root: Path) -> None:
    """The tool writes a model that transformers loads, and checks its logits; here its weights too."""
    from transformers import AutoModelForCausalLM

    tool = runpy.run_path(str(repo_root / "tools" / "convert_to_hf.py"))
    assert tool["main"](["--load", str(run), "--save", str(directory)]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    for name, tensor in exported_weights(run).items():
        if loaded[name].shape == tensor.shape:  # K and V are repeated where stock GQA cannot express the groups
            assert torch.equal(loaded[name], tensor), name
        else:
            assert name.endswith(("k_proj.weight", "v_proj.weight")), name
