"""The offline suite tells a trained model from its pruned form, and that from random weights of the same shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_prune.architecture import TensorSpec, tensor_specs
from megatron_prune.checkpoint.hf import SourceWeights, copy_companions, export_hf, read_architecture, read_config
from megatron_prune.evaluation.harness import evaluate, prepare_environment
from megatron_prune.evaluation.offline import write_offline_tasks
from megatron_prune.evaluation.report import AVERAGE, plain_rows
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.placement import deposit_
from megatron_prune.pruning.planner import Budget, choose, strike_out
from megatron_prune.pruning.saliency import random_vectors

QUESTIONS = (
    100  # of each kind; a standard error of 2.9 points for one model, less for differences on the same questions
)
SHARE = 0.7


def cut(source: Path, directory: Path) -> None:
    """Cut random channels and heads out of a model, down to a share of its parameters, and train nothing."""
    arch = read_architecture(source)
    partition, vectors = Partition.of(arch), random_vectors(Partition.of(arch), seed=0, step=0)
    budget = Budget(int(SHARE * arch.num_parameters()), None, {"attention": 1, "ffn": 1, "stem": 1})
    while not budget.met(partition.architecture()):
        decision = choose(vectors, partition, budget, "mean")
        assert decision is not None
        partition, vectors = decision.partition, strike_out(vectors, decision.group)
    weights = SourceWeights(source, arch)

    def remaining(spec: TensorSpec) -> torch.Tensor:
        whole = weights.tensor(spec.name)
        logical = whole.new_zeros(partition.logical_shape(spec))
        deposit_(logical, whole.flatten(), spec, partition, 0, 0)
        return logical

    export_hf(
        directory,
        partition.architecture(),
        {spec.name: remaining(spec) for spec in tensor_specs(arch)},
        dtype=torch.float32,
        tokenizer_dir=source,
        source_config=read_config(source),
        max_shard_bytes=10**9,
    )


def test_a_better_model_answers_more(tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prepare_environment()
    source, pruned, fresh = repo_root / "examples/demo/source", tmp_path / "pruned", tmp_path / "fresh"
    cut(source, pruned)
    before, after = read_architecture(source), read_architecture(pruned)
    assert 0.69 < after.num_parameters() / before.num_parameters() <= SHARE
    assert after.hidden_size < before.hidden_size
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(pruned)).save_pretrained(fresh)
    copy_companions(pruned, fresh)

    tasks = write_offline_tasks(tmp_path / "tasks", QUESTIONS)
    average = {
        model.name: plain_rows(evaluate(model, tasks, tmp_path / "tasks"), tasks)["acc"][AVERAGE]
        for model in (source, pruned, fresh)
    }
    # Over other questions and other random cuts the gaps were 5 to 9 points and 13 to 17; chance is 25 of 100.
    assert average["source"] > average["pruned"] + 2, average
    assert average["pruned"] > average["fresh"] + 8, average
    assert average["fresh"] == pytest.approx(25, abs=8), average
