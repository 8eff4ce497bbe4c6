"""Started by test_fragments.py on two processes: our fragments against DeepSpeed's own (slow, collective) accessors."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state

from megatron_prune.config import load_config
from megatron_prune.parallel.collectives import sum_over_copies_
from megatron_prune.parallel.mesh import init_process_group
from megatron_prune.parallel.states import StateKind
from megatron_prune.pruning.saliency import is_output_matrix
from megatron_prune.training.inputs import read_inputs, read_source
from megatron_prune.training.report import Reporter
from megatron_prune.training.setup import build_trainer


def main() -> None:
    """Compare gradients inside a step, then masters and moments after it."""
    config = load_config(sys.argv[1:])
    report = Path(str(config.run.save))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, save=None))
    inputs = read_inputs(config, *read_source(config))
    device = init_process_group()
    reporter = Reporter(None, config, False, None)
    trainer = build_trainer(config, inputs, device, reporter)
    engine, mesh = trainer.engine, trainer.mesh
    compared = []

    def compare_gradients() -> None:
        own = {f.spec.name: f for f in engine.output_fragments()}
        for entry in engine.parameters():
            if not is_output_matrix(entry.spec):
                continue
            product = safe_get_full_fp32_param(entry.parameter) * safe_get_full_grad(entry.parameter)
            mine = torch.zeros(product.numel())
            if entry.spec.name in own:
                fragment = own[entry.spec.name]
                stop = fragment.start + fragment.weight.numel()
                mine[fragment.start : stop] = fragment.weight * fragment.grad
            sum_over_copies_(mine, mesh)
            assert product.abs().max() > 0
            torch.testing.assert_close(mine, product.flatten(), rtol=1e-6, atol=0)
            compared.append(entry.spec.name)

    for step in range(2):
        engine.train_step(trainer.batches.training(4 * step), 1e-3, compare_gradients)
    names: dict[StateKind, str | None] = {"master": None, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    states = {(f.spec.name, f.kind): f for f in engine.state_fragments()}
    for entry in engine.parameters():
        for kind, key in names.items():
            theirs = (
                safe_get_full_fp32_param(entry.parameter)
                if key is None
                else safe_get_full_optimizer_state(entry.parameter, key)
            )
            mine = torch.zeros(theirs.numel())
            if (entry.spec.name, kind) in states:
                state = states[entry.spec.name, kind]
                mine[state.start : state.start + state.values.numel()] = state.values
            sum_over_copies_(mine, mesh)
            assert torch.equal(mine, theirs.flatten()), (entry.spec.name, kind)
    assert len(compared) == 2 * 2 * inputs.source.num_layers
    if mesh.is_main:
        report.write_text(f"{len(compared)} gradients compared")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
