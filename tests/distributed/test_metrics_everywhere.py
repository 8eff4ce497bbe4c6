"""Every metric and the second-order update on tensor, pipeline and data parallel processes, against one process.

One run for each layout prunes by ``obc`` with ``--second-order``; all other metrics choose along the way.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layout_runs import (
    HEAD_DIM,
    HERE,
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

#: Untied, so that the output head is updated too.
SOURCE = Source(heads=6, kv_heads=3, tied=False)
ONE = Layout()
LAYOUTS = (Layout(tensor=2), Layout(pipeline=2), Layout(data=2))
#: Those with vectors worth comparing: a float64 reference has no moments of Adam's and no random draws.
MEASURED = ("taylor", "taylor-mixed", "diag-hessian", "vectorize", "wanda", "obc", "magnitude")
WITHOUT_REFERENCE = ("taylor-mixed adam", "diag-hessian adam", "random")

Made = Callable[[Layout], Path]


@pytest.fixture(scope="module")
def made(runs: Runs) -> Made:
    """The run of a layout, made once. With tensor parallelism it splits sequences and recomputes."""
    finished: dict[Layout, Path] = {}

    def get(layout: Layout) -> Path:
        if layout not in finished:
            directory = runs.root / f"metrics-{layout}"
            directory.mkdir()
            flags = [*runs.flags(SOURCE, layout, directory, prune_metric="obc"), "--second-order"]
            flags += ["--sequence-parallel", "--recompute"] if layout.tensor > 1 else []
            runs.cluster.run(HERE / "metrics_worker.py", flags, layout.processes, directory)
            finished[layout] = directory
        return finished[layout]

    return get


def test_the_first_vectors_are_the_references(made: Made, runs: Runs) -> None:
    """Of one process, through the engine: four micro-batches, masters, hooks and all."""
    sys.path.insert(0, str(HERE.parent / "unit" / "pruning"))
    reference_of = importlib.import_module("metric_reference")
    sys.path.pop(0)
    weights = load_file(runs.source(SOURCE) / "model.safetensors")
    groups = [[SOURCE.heads // SOURCE.kv_heads] * SOURCE.kv_heads] * SOURCE.layers
    reference = reference_of.reference_class()(
        weights, SOURCE.layers, SOURCE.heads, groups, HEAD_DIM, 1e-6, 10000.0, SOURCE.tied
    )
    config = load_config(runs.flags(SOURCE, ONE, runs.root / "unused"))
    inputs = read_inputs(config, *read_source(config))
    tokens = inputs.train.batch(0, config.train.global_batch_size)
    gradients = [reference.gradients(part) for part in tokens.chunk(config.train.global_batch_size)]
    seen_by_layers = reference_of.layer_inputs(reference, tokens)
    (seen,) = witnessed(made(ONE))
    for metric in MEASURED:
        parts = reference_of.measure(reference, metric, gradients, seen_by_layers)
        for name, expected in zip(("heads", "ffn", "stem"), parts, strict=True):
            largest = np.abs(expected).max()
            np.testing.assert_allclose(
                seen[f"{metric}/{name}"], expected, rtol=1e-4, atol=1e-5 * largest, err_msg=f"{metric}/{name}"
            )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_metric_sees_and_chooses_the_same(made: Made, layout: Layout) -> None:
    run, baseline = made(layout), made(ONE)
    (whole,) = witnessed(baseline)
    for rank in witnessed(run):
        for key in (f"{metric}/{name}" for metric in MEASURED for name in ("heads", "ffn", "stem")):
            mine, other = rank[key], whole[key]
            if not key.endswith("stem"):
                mine, other = mine[rank["layers"]], other[rank["layers"]]
            np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5 * np.abs(other).max(), err_msg=key)
    ours, theirs = (json.loads((path / "choices.json").read_text()) for path in (run, baseline))
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == other
    counts: Counter[str] = Counter()
    for choice in theirs:
        counts[choice["metric"]] += len(choice["groups"])
    assert set(counts) == {*MEASURED, *WITHOUT_REFERENCE}
    assert min(counts.values()) >= 50, counts


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_second_order_pruning_is_the_same(made: Made, layout: Layout) -> None:
    assert_same_decisions(made(layout), made(ONE))
    # X X^T has a condition of some thousands, and rounding grows with every one of sixty updates.
    assert_same_curves(made(layout), made(ONE), slack=10)
    assert_same_weights(made(layout), made(ONE), slack=10)


def test_metrics_differ_and_adam_waits_for_its_first_step(made: Made) -> None:
    choices: list[dict[str, Any]] = json.loads((made(ONE) / "choices.json").read_text())
    metrics = (*MEASURED, *WITHOUT_REFERENCE)
    chosen = {json.dumps([choice["groups"] for choice in choices if choice["metric"] == name]) for name in metrics}
    assert len(chosen) == len(metrics)
    first = {choice["metric"]: choice["groups"] for choice in choices if choice["step"] == 0}
    assert first["diag-hessian adam"] == first["taylor-mixed adam"] == []
    assert first["diag-hessian"]
    assert {event["type"] for event in lines(made(ONE) / "ledger.jsonl")} == {"attention", "ffn", "stem"}
