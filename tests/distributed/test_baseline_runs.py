"""What pruning while training is compared with, and what may go with it, on one process and split over four.

Few-shot pruning, ShearedLlama, distillation from the source, and a micro-batch that grows.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layout_runs import (
    HERE,
    VOCAB_SIZE,
    Layout,
    Runs,
    Source,
    assert_same_curves,
    assert_same_decisions,
    assert_same_weights,
    lines,
)
from torch import Tensor, nn
from torch.nn import functional

from megatron_prune.checkpoint.store import Checkpoint
from megatron_prune.data.blend import TokenBlend, parse_data_path
from megatron_prune.model import CausalLM, logical_shapes
from megatron_prune.ops.dispatch import torch_ops

ONE, SPLIT, COPIES = Layout(), Layout(tensor=2, pipeline=2, sequence_parallel=True), Layout(data=2)
SOURCE = Source(heads=6, kv_heads=3, tied=True)
SEQ_LENGTH, BATCH = 12, 4
SAMPLES = 8
FEW_SHOT: dict[str, Any] = {"few_shot_samples": SAMPLES, "prune_start_iter": None, "save_interval": 7}
SHARE, TEMPERATURE = 0.6, 2.0
LAST = 14
TAUGHT: dict[str, Any] = {
    "distill_weight": SHARE,
    "distill_temperature": TEMPERATURE,
    "save_interval": LAST - 1,
}
SHEARED: dict[str, Any] = {"sheared_iters": 6, "prune_start_iter": None}


def losses(run: Path) -> list[float]:
    """Of every training step."""
    return [line["loss"] for line in lines(run / "metrics.jsonl") if "loss" in line]


def test_few_shot_pruning_is_what_the_first_gradient_says(runs: Runs) -> None:
    """A ratio at which one step removes everything chooses the same from the same samples."""
    few = runs.get(SOURCE, ONE, few_shot_samples=BATCH, prune_start_iter=None)
    at_once = runs.get(SOURCE, ONE, prune_ratio="9999:1")
    ours, theirs = lines(few / "ledger.jsonl"), lines(at_once / "ledger.jsonl")
    assert [(event["type"], event["removed"]) for event in ours] == [
        (event["type"], event["removed"]) for event in theirs
    ]
    for event, other in zip(ours, theirs, strict=True):
        assert event["scores"] == pytest.approx(other["scores"], rel=1e-6)
        assert (event["step"], event["tokens"]) == (0, BATCH * SEQ_LENGTH)
    assert ours[-1]["shape"] == {"hidden_size": 24, "ffn_hidden_size": 20, "num_attention_heads": 3}


def test_few_shot_pruning_comes_before_training_and_counts_its_samples(runs: Runs) -> None:
    metrics = lines(runs.get(SOURCE, ONE, **FEW_SHOT) / "metrics.jsonl")
    assert (metrics[0]["step"], metrics[0]["tokens"]) == (0, SAMPLES * SEQ_LENGTH)
    assert "val_loss" in metrics[0]
    assert (metrics[1]["step"], metrics[1]["tokens"]) == (1, (SAMPLES + BATCH) * SEQ_LENGTH)
    assert {line["hidden_size"] for line in metrics if "hidden_size" in line} == {24}


def test_few_shot_pruning_on_every_axis_of_the_layout(runs: Runs) -> None:
    ours, theirs = runs.get(SOURCE, SPLIT, **FEW_SHOT), runs.get(SOURCE, ONE, **FEW_SHOT)
    assert_same_decisions(ours, theirs)
    assert_same_curves(ours, theirs)
    assert_same_weights(ours, theirs)


def test_a_resumed_few_shot_run_does_not_prune_again(runs: Runs) -> None:
    baseline, copy = runs.get(SOURCE, ONE, **FEW_SHOT), runs.root / "few-shot-resumed"
    shutil.copytree(runs.get(SOURCE, SPLIT, **FEW_SHOT), copy)
    shutil.rmtree(copy / "checkpoints" / f"step_{LAST:08d}")
    runs.cluster.run(HERE / "layout_worker.py", runs.flags(SOURCE, ONE, copy, **FEW_SHOT), 1, copy)
    assert "resuming" in (copy / "rank0.log").read_text()
    assert_same_decisions(copy, baseline)
    assert_same_curves(copy, baseline)


def _student(checkpoint: Checkpoint) -> CausalLM:
    arch = checkpoint.manifest.partition.architecture()
    student = CausalLM(arch, logical_shapes(arch), torch_ops())
    for name, spec in checkpoint.specs().items():
        *path, attribute = name.split(".")
        setattr(student.get_submodule(".".join(path)), attribute, nn.Parameter(checkpoint.live(spec, "master")))
    return student


@torch.no_grad()
def test_distillation_is_its_definition_with_the_source_as_transformers_runs_it(runs: Runs) -> None:
    from transformers import MistralForCausalLM

    run = runs.get(SOURCE, ONE, **TAUGHT)
    step = LAST - 1
    blend = TokenBlend(parse_data_path((str(runs.data()),)), SEQ_LENGTH, 1234, "80,20,0", "train", VOCAB_SIZE)
    tokens = blend.batch(step * BATCH, BATCH)
    student = _student(Checkpoint(run / "checkpoints" / f"step_{step:08d}"))(tokens[:, :-1]).flatten(0, 1)
    teacher: Tensor = MistralForCausalLM.from_pretrained(runs.source(SOURCE))(tokens[:, :-1]).logits.flatten(0, 1)
    divergence = functional.kl_div(
        functional.log_softmax(student / TEMPERATURE, dim=1),
        functional.softmax(teacher / TEMPERATURE, dim=1),
        reduction="batchmean",
    )
    cross_entropy = functional.cross_entropy(student, tokens[:, 1:].flatten())
    expected = (1 - SHARE) * cross_entropy + SHARE * TEMPERATURE**2 * divergence
    assert divergence > 0.05
    assert losses(run)[step] == pytest.approx(float(expected), abs=2e-5)


def test_the_source_agrees_with_itself(runs: Runs) -> None:
    """Before the first step there is nothing to learn from the teacher."""
    assert losses(runs.get(SOURCE, ONE, **TAUGHT))[0] == pytest.approx((1 - SHARE) * losses(runs.get(SOURCE, ONE))[0])


def test_distillation_on_every_axis_of_the_layout(runs: Runs) -> None:
    ours, theirs = runs.get(SOURCE, SPLIT, **TAUGHT), runs.get(SOURCE, ONE, **TAUGHT)
    assert_same_decisions(ours, theirs)
    assert_same_curves(ours, theirs)
    assert_same_weights(ours, theirs)


def test_sheared_masks_lead_to_the_target_on_copies_too(runs: Runs) -> None:
    ours, theirs = runs.get(SOURCE, COPIES, **SHEARED), runs.get(SOURCE, ONE, **SHEARED)
    events = lines(theirs / "ledger.jsonl")
    assert {event["step"] for event in events} == {SHEARED["sheared_iters"]}
    assert events[-1]["shape"] == {"hidden_size": 24, "ffn_hidden_size": 20, "num_attention_heads": 3}
    assert_same_decisions(ours, theirs)
    assert_same_curves(ours, theirs)
    assert_same_weights(ours, theirs)
    plain = losses(runs.get(SOURCE, ONE))
    assert np.abs(np.subtract(losses(theirs), plain)[: SHEARED["sheared_iters"]]).max() > 1e-2, "masks do something"


def test_a_stopped_run_goes_on_with_its_masks_on_other_copies_too(runs: Runs) -> None:
    settings = {**SHEARED, "save_interval": 3, "keep_last": 9}
    whole, copy = runs.get(SOURCE, ONE, **settings), runs.root / "sheared-resumed"
    shutil.copytree(whole, copy)
    for directory in (copy / "checkpoints").glob("step_*"):
        if directory.name != "step_00000003":
            shutil.rmtree(directory)
    runs.cluster.run(HERE / "layout_worker.py", runs.flags(SOURCE, COPIES, copy, **settings), COPIES.processes, copy)
    assert "resuming" in (copy / "rank0.log").read_text()
    assert_same_decisions(copy, whole)
    assert_same_curves(copy, whole)
    assert_same_weights(copy, whole)


def test_a_micro_batch_that_grows_changes_nothing(runs: Runs) -> None:
    ours, theirs = runs.get(SOURCE, ONE, grow_micro_batch=True), runs.get(SOURCE, ONE)
    assert "micro_batch_size 2" in (ours / "rank0.log").read_text()
    assert_same_decisions(ours, theirs)
    assert_same_curves(ours, theirs)
    assert_same_weights(ours, theirs)
