"""The benchmarks of steps and of one-shot pruning compare equal computations and add up; no time is judged.

All of them run once, tiny, in one process of their own: importing DeepSpeed is most of their time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune.architecture import Architecture, tensor_specs
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.placement import deposit_
from megatron_prune.pruning.groups import GroupType
from megatron_prune.pruning.planner import Budget, choose, strike_out
from megatron_prune.pruning.saliency import SaliencyVectors

Rows = list[dict[str, Any]]
SMALL = ["--model", "1M", "--seq-length", "16", "--micro-batch-size", "1", "--rounds", "1"]
BENCHMARKS = {
    "fp32": ["vs_transformers", *SMALL],
    "bf16": ["vs_transformers", *SMALL, "--precision", "bf16"],
    "cost": ["pruning_cost", *SMALL, "--prune-align", "16", "--compactions", "1"],
    "fresh": ["pruned_vs_fresh", *SMALL],
    "one_shot": ["one_shot", "--model", "tiny", "--rounds", "1"],
}
RUN_ALL = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
for module, *arguments in json.loads(sys.argv[2]):
    status = importlib.import_module(module).main(arguments)
    if status:
        sys.exit(f"{module}: {status}")
"""


@pytest.fixture(scope="module")
def tables(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    directory = tmp_path_factory.mktemp("tables")
    files = {name: directory / f"{name}.json" for name in BENCHMARKS}
    words = [[*arguments, "--json", str(files[name])] for name, arguments in BENCHMARKS.items()]
    command = [sys.executable, "-c", RUN_ALL, str(repo_root / "benchmarks"), json.dumps(words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo_root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: json.loads(file.read_text())["rows"] for name, file in files.items()}


@pytest.fixture
def benchmark_module(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    import importlib

    return importlib.import_module


@pytest.mark.parametrize(("precision", "more"), [("fp32", []), ("bf16", ["ours, fp32"])])
def test_a_step_is_compared_with_transformers(tables: dict[str, Rows], precision: str, more: list[str]) -> None:
    rows = tables[precision]
    assert [row["side"] for row in rows] == ["ours", "transformers + DeepSpeed", "transformers, plain loop", *more]
    assert rows[0]["time / ours"]["median"] == 1
    assert all(row["our peak / its"] > 0 for row in rows)
    assert all(float(row["loss"]) == pytest.approx(float(rows[0]["loss"]), rel=1e-3) for row in rows)


@pytest.mark.parametrize("wrong", ["loss", "norm", "gradient"])
def test_sides_that_compute_something_else_are_told_apart(benchmark_module: Callable[[str], Any], wrong: str) -> None:
    module = benchmark_module("vs_transformers")
    gradient = torch.tensor([3.0, 4.0])

    def side(loss: float, norm: float, values: torch.Tensor) -> Any:
        def train(gradients: dict[str, torch.Tensor] | None) -> tuple[float, float]:
            if gradients is not None:
                gradients["w"] = values
            return loss, norm

        return module.Side(train)

    peer = "transformers, plain loop"
    assert module.disagreement({"ours": side(2.0, 5.0, gradient), peer: side(2.0, 5.0, gradient)}, "fp32") is None
    other = {"loss": (2.1, 5.0, gradient), "norm": (2.0, 5.1, gradient), "gradient": (2.0, 5.0, gradient.flip(0))}
    problem = module.disagreement({"ours": side(2.0, 5.0, gradient), peer: side(*other[wrong])}, "fp32")
    assert wrong in problem


def test_the_cost_of_pruning_adds_up(tables: dict[str, Rows]) -> None:
    slow, even, fast = tables["cost"]
    assert [row["ratio"] for row in (slow, even, fast)] == ["1:9", "1:1", "4:1"]
    parts = [f"{part} %" for part in ("saliency", "communication", "choice", "zeroing", "compaction")]
    for row in (slow, even, fast):
        assert all(row[part] > 0 for part in parts)
        assert row["all %"] == pytest.approx(sum(row[part] for part in parts))
    assert all(even[part] == pytest.approx(9 * slow[part]) for part in parts)
    assert fast["compaction %"] * fast["step ms"] == pytest.approx(4 * even["compaction %"] * even["step ms"])
    assert slow["target"].startswith("<= 1 ")
    assert fast["target"] == ""


def test_a_pruned_model_meets_one_of_its_shape(tables: dict[str, Rows]) -> None:
    cut, fresh, whole = tables["fresh"]
    assert cut["parameters held"] == fresh["parameters held"] != whole["parameters held"]
    assert cut["cut / this"] == {"low": 1, "median": 1, "high": 1}
    assert fresh["target"].startswith(">= 0.97, <= 1.03 ")


def test_one_shot_writes_what_transformers_loads(tables: dict[str, Rows]) -> None:
    ours, *peers = tables["one_shot"]
    assert ours["hidden/ffn/heads/kv"].startswith("48/64/4/")
    assert ours["loads in transformers"] == "yes"
    assert ours["all / ours"]["median"] == 1
    assert [row["side"] for row in peers] == ["torch-pruning", "ModelOpt"]
    for row in peers:  # which need not be installed, and then say so
        assert row["loads in transformers"].startswith(("yes", "no result: "))


def test_sorting_once_removes_what_the_planner_would(benchmark_module: Callable[[str], Any]) -> None:
    one_shot = benchmark_module("one_shot")
    arch = Architecture(
        family="llama",
        num_layers=3,
        hidden_size=24,
        ffn_hidden_size=20,
        num_attention_heads=6,
        kv_groups=((3, 3),) * 3,
        head_dim=4,
        vocab_size=11,
        tie_embeddings=True,
    )
    draw = np.random.default_rng(5)
    vectors = SaliencyVectors(heads=draw.random((3, 6)), ffn=draw.random((3, 20)), stem=draw.random(24))
    widths = one_shot.Widths(hidden=10, ffn=7, heads=2)
    found = one_shot.remove_least(Partition.of(arch), vectors, widths)

    goal: dict[GroupType, int] = {"stem": 10, "ffn": 7, "attention": 2}
    budget = Budget(None, goal, {"stem": 1, "ffn": 1, "attention": 1})
    partition = Partition.of(arch)
    while not budget.met(partition.architecture()):
        decision = choose(vectors, partition, budget, "mean")
        assert decision is not None
        partition, vectors = decision.partition, strike_out(vectors, decision.group)

    assert found.to_dict() == partition.to_dict()
    assert any(len(groups) == 1 for groups in found.architecture().kv_groups), "no KV head went: a weak case"
    for spec in tensor_specs(arch):
        whole = torch.from_numpy(draw.random(arch.tensor_shape(spec)))
        expected = whole.new_zeros(partition.logical_shape(spec))
        deposit_(expected, whole.reshape(-1), spec, partition, 0, 0)
        assert torch.equal(one_shot.slice_tensor(whole, spec, found), expected), spec.name
