"""The layout changes the speed and nothing else: one run on every way to share it out, equal to one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layout_runs import (
    HEAD_DIM,
    WEIGHTS_ABS,
    Layout,
    Runs,
    Source,
    assert_same_curves,
    assert_same_decisions,
    assert_same_weights,
    lines,
    witnessed,
)
from safetensors.torch import load_file

from megatron_prune.config import load_config
from megatron_prune.training.inputs import read_inputs, read_source

ONE = Layout()
#: tensor, pipeline, data
SIZES = ((2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2))
LAYOUTS = [Layout(*size, sequence) for size in SIZES for sequence in ((False, True) if size[0] > 1 else (False,))]
#: Tied and untied, MHA and GQA; three layers make stages of different depth.
SOURCES = [
    Source(heads=6, kv_heads=3, tied=True),
    Source(heads=6, kv_heads=2, tied=False, layers=3),
    Source(heads=6, kv_heads=6, tied=True),
    Source(heads=6, kv_heads=6, tied=False),
]
TIED_GQA = SOURCES[0]
#: One process differs from another by up to 2e-3 and 2e-2 (measured).
BF16_REL = {"loss": 5e-3, "val_loss": 5e-3, "grad_norm": 5e-2}


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_the_baseline_is_worth_comparing_with(runs: Runs, source: Source) -> None:
    run = runs.get(source, ONE)
    events = lines(run / "ledger.jsonl")
    assert len(events) >= 60
    assert {event["type"] for event in events} == {"attention", "ffn", "stem"}
    (seen,) = witnessed(run)
    assert len(seen["compactions"]) >= 3
    steps = [line for line in lines(run / "metrics.jsonl") if "loss" in line]
    assert steps[-1]["step"] >= max(events[-1]["step"], seen["compactions"][-1]) + 3, "training went on"
    assert all(line["grad_norm"] > 2.0 for line in steps), "every step is clipped"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_a_run_equals_one_process(runs: Runs, source: Source, layout: Layout) -> None:
    baseline = runs.get(source, ONE)
    run = runs.get(source, layout)
    assert_same_decisions(run, baseline)
    assert_same_curves(run, baseline)
    assert_same_weights(run, baseline)
    compactions = {tuple(rank["compactions"]) for rank in witnessed(run)}
    assert len(compactions) == 1, "all ranks cut at the same steps"
    assert len(compactions.pop()) >= 3


@pytest.mark.parametrize("layout", [ONE, *LAYOUTS], ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_first_saliency_equals_fp64(runs: Runs, source: Source, layout: Layout) -> None:
    heads, ffn, stem = first_saliency(runs, source)
    seen = witnessed(runs.get(source, layout))
    assert len(seen) == layout.processes
    for rank in seen:
        own = rank["layers"]
        np.testing.assert_allclose(rank["heads"][own], heads[own], rtol=1e-5)
        np.testing.assert_allclose(rank["ffn"][own], ffn[own], rtol=1e-5)
        np.testing.assert_allclose(rank["stem"], stem, rtol=1e-5)
    assert {int(layer) for rank in seen for layer in rank["layers"]} == set(range(source.layers))


@pytest.mark.parametrize("layout", [Layout(2, 2), Layout(2, 2, sequence_parallel=True)], ids=str)
def test_bf16_stays_within_its_noise(runs: Runs, layout: Layout) -> None:
    """With decisions that read no weight: bf16's own would differ and leave different models to compare."""
    baseline, run = (runs.get(TIED_GQA, place, precision="bf16", prune_metric="random") for place in (ONE, layout))
    assert_same_decisions(run, baseline)
    ours, theirs = lines(run / "metrics.jsonl"), lines(baseline / "metrics.jsonl")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for key, tolerance in BF16_REL.items():
            if key in mine:
                assert mine[key] == pytest.approx(other[key], rel=tolerance), f"{key} of step {mine['step']}"
    assert all(len(rank["compactions"]) >= 3 for rank in witnessed(run))


def test_bf16_decides_by_its_gradients(runs: Runs) -> None:
    run = runs.get(TIED_GQA, Layout(2, 2), precision="bf16")
    assert lines(run / "ledger.jsonl")[-1]["shape"] == {
        "hidden_size": 24,
        "ffn_hidden_size": 20,
        "num_attention_heads": 3,
    }
    heads, ffn, stem = first_saliency(runs, TIED_GQA)
    for rank in witnessed(run):
        own = rank["layers"]
        np.testing.assert_allclose(rank["heads"][own], heads[own], rtol=0.05)
        np.testing.assert_allclose(rank["ffn"][own], ffn[own], rtol=0.1)
        np.testing.assert_allclose(rank["stem"], stem, rtol=0.05)


def test_a_snapshot_on_the_way_equals_one_process(runs: Runs) -> None:
    """Of a tied model: the last stage has a copy of the embedding, which must not be added to it."""
    baseline, run = (runs.get(TIED_GQA, layout, export_at="20K") for layout in (ONE, Layout(2, 2, 2)))
    ours, theirs = (load_file(path / "exports" / "20K" / "model.safetensors") for path in (run, baseline))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() <= WEIGHTS_ABS, name
    sizes = [event["parameters"] for event in lines(baseline / "ledger.jsonl")]
    assert sizes[0] > 20_000 > sizes[-1], "written on the way down"


def first_saliency(runs: Runs, source: Source) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums of the first step by the brute force of tests/unit/pruning/reference.py, in fp64."""
    weights = load_file(runs.source(source) / "model.safetensors")
    if source.tied:
        weights.pop("lm_head.weight", None)
    group = source.heads // source.kv_heads
    reference = brute_force()(
        weights,
        num_layers=source.layers,
        num_heads=source.heads,
        kv_groups=[[group] * source.kv_heads] * source.layers,
        head_dim=HEAD_DIM,
        eps=1e-6,
        rope_theta=10000.0,
        tied=source.tied,
    )
    config = load_config(runs.flags(source, ONE, runs.root / "unused"))
    inputs = read_inputs(config, *read_source(config))
    heads, ffn, stem = reference.saliency(inputs.train.batch(0, config.train.global_batch_size))
    return np.array(heads), np.array(ffn), np.array(stem)


def brute_force() -> Any:
    path = Path(__file__).parents[1] / "unit" / "pruning" / "reference.py"
    spec = importlib.util.spec_from_file_location("brute_force_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Reference
