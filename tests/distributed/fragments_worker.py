"""Run by launcher.py on every rank: our fragments and sums against DeepSpeed's own (slow, collective) accessors."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state
from torch import Tensor

from megatron_prune.config import load_config
from megatron_prune.model.pipeline import NamedParameter
from megatron_prune.parallel.mesh import init_process_group
from megatron_prune.parallel.partition import DEAD
from megatron_prune.parallel.states import STATE_KINDS
from megatron_prune.pruning.saliency import is_output_matrix
from megatron_prune.training.inputs import read_inputs, read_source
from megatron_prune.training.loop import Trainer
from megatron_prune.training.pruner import Pruner
from megatron_prune.training.report import Reporter
from megatron_prune.training.setup import build_trainer

STEPS = 2


def main() -> None:
    """Compare gradients, their sums and saliency inside two steps, then masters and moments after them."""
    config = load_config(sys.argv[1:])
    report = Path(str(config.run.save))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, save=None))
    inputs = read_inputs(config, *read_source(config))
    device = init_process_group()
    trainer = build_trainer(config, inputs, device, Reporter(None, config, False, None))
    compared: list[str] = []

    local = watch_local_gradients(trainer)

    def compare() -> None:
        compared.extend(compare_gradients(trainer))
        compared.extend(compare_sums(trainer, local))
        compare_saliency(trainer)

    for step in range(STEPS):
        trainer.engine.train_step(trainer.batches.training(4 * step), 1e-3, compare)
    compared.extend(compare_states(trainer))
    (report / f"rank{os.environ['RANK']}.txt").write_text("\n".join(compared))
    dist.destroy_process_group()


def compare_gradients(trainer: Trainer) -> list[str]:
    """Every element of weight times gradient; returns the names of this rank's matrices."""
    own = {f.spec.name: f for f in trainer.engine.output_fragments()}
    names = []
    for entry in output_matrices(trainer):
        product = safe_get_full_fp32_param(entry.parameter) * safe_get_full_grad(entry.parameter)
        mine = torch.zeros(product.numel())
        if entry.spec.name in own:
            fragment = own[entry.spec.name]
            mine[fragment.start :][: fragment.weight.numel()] = fragment.weight * fragment.grad
        add_up_copies_(mine, entry)
        assert product.abs().max() > 0
        torch.testing.assert_close(mine, product.flatten(), rtol=1e-6, atol=0)
        names.append(f"grad/{entry.spec.name}")
    return names


def watch_local_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """BF16_Optimizer's gradients of this copy alone, by name, filled whenever DeepSpeed is about to add them up."""
    local: dict[str, Tensor] = {}
    raw = trainer.engine._engine
    reduce = raw.buffered_allreduce_fallback

    def watched(*args: Any, **kwargs: Any) -> None:
        local.update((e.spec.name, trainer.engine._gradient(e).clone()) for e in trainer.engine.parameters())
        reduce(*args, **kwargs)

    raw.buffered_allreduce_fallback = watched
    return local


def compare_sums(trainer: Trainer, local: dict[str, Tensor]) -> list[str]:
    """The mean over the copies against an fp32 one of the same summands: nothing was rounded to bf16 on the way."""
    for entry in trainer.engine.parameters() if local else ():
        parameter: Any = entry.parameter
        mean = local[entry.spec.name]
        dist.all_reduce(mean, group=parameter._dp_group)
        mean /= trainer.mesh.dp_size
        torch.testing.assert_close(trainer.engine._gradient(entry), mean, rtol=1e-6, atol=0)
        if entry.spec.name == head_name(trainer):
            tokens = trainer.engine.partition.slots("vocab", None, trainer.mesh.tp_rank)
            rows = mean.view(entry.parameter.shape)[tokens != DEAD]
            assert rows.any(1).all(), "the loss has a gradient for every token, in the text or not"
        assert not torch.equal(mean.bfloat16().float(), mean), "rounding would not have shown"
    names = [f"sum/{name}" for name in local]
    local.clear()
    return names


def head_name(trainer: Trainer) -> str:
    """The matrix of the output projection."""
    return "model.embed_tokens.weight" if trainer.engine.partition.source.tie_embeddings else "lm_head.weight"


def compare_saliency(trainer: Trainer) -> None:
    """The vectors the ranks decide from, against fp64 sums over DeepSpeed's whole shards."""
    mesh, partition = trainer.mesh, trainer.engine.partition
    source = partition.source
    heads = np.zeros((source.num_layers, source.num_attention_heads))
    ffn = np.zeros((source.num_layers, source.ffn_hidden_size))
    stem = np.zeros(source.hidden_size)
    for entry in output_matrices(trainer):
        layer = entry.spec.layer
        weight, grad = safe_get_full_fp32_param(entry.parameter), safe_get_full_grad(entry.parameter)
        score = (weight.double() * grad.double()).abs().view(weight.shape).numpy()
        if mesh.dp_rank:  # the copies hold the same
            continue
        stem += score.sum(1)  # nothing is removed yet: a slot of the stem is its channel
        if entry.spec.axes[1] == "heads":
            add(heads[layer], partition.slots("heads", layer, mesh.tp_rank), score.sum(0).reshape(-1, source.head_dim))
        else:
            add(ffn[layer], partition.slots("ffn", layer, mesh.tp_rank), score.sum(0)[:, None])
    for vector in (heads, ffn, stem):
        dist.all_reduce(torch.from_numpy(vector))
    pruner = trainer._pruner
    assert isinstance(pruner, Pruner)
    mine, layers = pruner._measure(0), list(trainer.engine.layers)
    assert stem.min() > 0
    np.testing.assert_allclose(mine.heads[layers], heads[layers], rtol=1e-5)
    np.testing.assert_allclose(mine.ffn[layers], ffn[layers], rtol=1e-5)
    np.testing.assert_allclose(mine.stem, stem, rtol=1e-5)


def compare_states(trainer: Trainer) -> list[str]:
    """Every element of master and moments; returns what was compared on this rank."""
    states = {(f.spec.name, f.kind): f for f in trainer.engine.state_fragments()}
    compared = []
    for entry in trainer.engine.parameters():
        if entry.is_stage_copy:  # the tied head, of which the embedding's stage speaks
            continue
        for kind in STATE_KINDS:
            if kind == "master":
                theirs = safe_get_full_fp32_param(entry.parameter)
            else:
                theirs = safe_get_full_optimizer_state(entry.parameter, kind)
            mine = torch.zeros(theirs.numel())
            if (entry.spec.name, kind) in states:
                state = states[entry.spec.name, kind]
                mine[state.start :][: state.values.numel()] = state.values
            add_up_copies_(mine, entry)
            assert torch.equal(mine, theirs.flatten()), (entry.spec.name, kind)
            compared.append(f"{kind}/{entry.spec.name}")
    return compared


def output_matrices(trainer: Trainer) -> list[NamedParameter]:
    """``o_proj`` and ``down_proj`` of this rank's stage."""
    return [entry for entry in trainer.engine.parameters() if is_output_matrix(entry.spec)]


def add_up_copies_(flat: Tensor, entry: NamedParameter) -> None:
    """Put the pieces of all data-parallel copies of a shard together, in the group DeepSpeed itself uses."""
    parameter: Any = entry.parameter
    dist.all_reduce(flat, group=parameter._dp_group)


def add(target: np.ndarray, slots: np.ndarray, values: np.ndarray) -> None:
    """Add the sums of physical slots ``[slots, width]`` to their units."""
    target[slots[slots != DEAD]] += values.sum(1)[slots != DEAD]


if __name__ == "__main__":
    main()
