"""Run by launcher.py on every rank: DeepSpeed's own loader on a universal checkpoint that this package wrote.

    universal_worker.py CHECKPOINT UNIVERSAL TENSOR_PARALLEL PIPELINE_PARALLEL

The engine is built at the compacted shape with fresh random weights, loads, and must then hold the checkpoint's
masters and moments bit for bit, which is written down by name in UNIVERSAL/rank<N>.txt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule

from megatron_prune.checkpoint.store import Checkpoint
from megatron_prune.model.pipeline import NamedParameter, build_pipeline, follow_partition, named_parameters
from megatron_prune.ops.dispatch import build_ops
from megatron_prune.parallel.mesh import Mesh, init_process_group, make_mesh
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.placement import take
from megatron_prune.parallel.states import STATE_KINDS
from megatron_prune.training.engine import prepare_deepspeed


def main() -> None:
    """Build an engine, load, compare."""
    checkpoint, universal = Checkpoint(Path(sys.argv[1])), Path(sys.argv[2])
    device = init_process_group()
    prepare_deepspeed()
    mesh = make_mesh(device, int(sys.argv[3]), int(sys.argv[4]))
    partition = checkpoint.manifest.partition.spread(mesh.tp_size)
    pipeline = build_pipeline(
        partition, build_ops({}, device), mesh, sequence_parallel=False, recompute=False, compile_layers=False
    )
    parameters = named_parameters(pipeline, partition)
    for entry in parameters:
        entry.replace(torch.randn(partition.shape(entry.spec, mesh.tp_rank)))
    follow_partition(pipeline, partition, mesh.tp_rank)
    engine = start_engine(pipeline, parameters, mesh)
    path, _ = engine.load_checkpoint(str(universal))
    assert path is not None
    assert engine.global_steps == checkpoint.manifest.progress.step
    compared = compare(checkpoint, parameters, partition, mesh)
    for state in engine.optimizer.optimizer.state.values():
        assert float(state["step"]) == checkpoint.manifest.progress.adam_steps
    (universal / f"rank{os.environ['RANK']}.txt").write_text("\n".join(compared))
    torch.distributed.destroy_process_group()


def start_engine(pipeline: PipelineModule, parameters: list[NamedParameter], mesh: Mesh) -> Any:
    """A ZeRO-1 pipeline engine as a user of DeepSpeed would make one: matrices decayed, vectors not."""
    groups: list[dict[str, Any]] = [
        {"params": [entry.parameter for entry in parameters if entry.parameter.dim() > 1]},
        {"params": [entry.parameter for entry in parameters if entry.parameter.dim() == 1], "weight_decay": 0.0},
    ]
    config = {
        "train_batch_size": mesh.dp_size,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1, "contiguous_gradients": False},
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "checkpoint": {"load_universal": True},
    }
    engine, *_ = deepspeed.initialize(model=pipeline, optimizer=torch.optim.AdamW(groups), config=config)
    return engine


def compare(checkpoint: Checkpoint, parameters: list[NamedParameter], partition: Partition, mesh: Mesh) -> list[str]:
    """Every fragment this rank owns, copies of a tied embedding included, against the checkpoint; what was compared."""
    compared = []
    for entry in parameters:
        mapping: Any = entry.parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            continue
        address = mapping.lp_fragment_address
        for kind in STATE_KINDS:
            ours = take(
                checkpoint.live(entry.spec, kind), entry.spec, partition, mesh.tp_rank, address.start, address.numel
            )
            theirs = mapping.get_hp_fragment(None if kind == "master" else kind).detach()
            assert torch.equal(ours, theirs), (entry.spec.name, kind)
            compared.append(f"{kind}/{entry.spec.name}:{address.numel}")
        low = entry.parameter.detach().flatten()[address.start :][: address.numel]
        assert torch.equal(low, mapping.get_hp_fragment().detach()), f"{entry.spec.name} was not given its master"
    return compared


if __name__ == "__main__":
    main()
