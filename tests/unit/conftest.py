"""What unit tests of several folders need: disks that are not waited for, a pruned model's state held in memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_prune.architecture import Architecture, TensorSpec, tensor_specs, uniform_kv_groups
from megatron_prune.checkpoint.manifest import Manifest, Progress
from megatron_prune.config import Config
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.placement import take
from megatron_prune.parallel.states import STATE_KINDS, StateKind
from megatron_prune.pruning.groups import MiniGroup, remove
from megatron_prune.pruning.ledger import Event, shape_of


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves are many, and nobody cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@dataclasses.dataclass
class HeldStates:
    """The :class:`~megatron_prune.checkpoint.reshard.SavedStates` of a model in memory."""

    manifest: Manifest
    events: list[Event]
    tensors: dict[tuple[str, StateKind], Tensor]

    def specs(self) -> dict[str, TensorSpec]:
        """The model's tensors by logical name."""
        return {spec.name: spec for spec in tensor_specs(self.manifest.partition.source)}

    def kinds(self) -> tuple[StateKind, ...]:
        """Masters, and moments after a step."""
        return STATE_KINDS if self.manifest.progress.adam_steps else STATE_KINDS[:1]

    def live(self, spec: TensorSpec, kind: StateKind = "master") -> Tensor:
        """The live tensor of one state."""
        return self.tensors[spec.name, kind]

    def fragment(
        self, spec: TensorSpec, kind: StateKind, partition: Partition, tp_rank: int, start: int, numel: int
    ) -> Tensor:
        """A rank's fragment of it."""
        return take(self.live(spec, kind), spec, partition, tp_rank, start, numel)


HoldStates = Callable[..., HeldStates]


@pytest.fixture(scope="session")
def hold_states() -> HoldStates:
    """Makes the state of a small model that lost a hidden channel, two FFN channels and a head of every layer."""

    def make(tied: bool = True, layers: int = 3, adam_steps: int = 7, target: str | None = "15K") -> HeldStates:
        source = Architecture(
            "qwen2", layers, 30, 44, 6, uniform_kv_groups(layers, 6, 3), 4, 51, tie_embeddings=tied, qkv_bias=True
        )
        groups = [
            MiniGroup("stem", 2),
            MiniGroup("ffn", tuple(range(layers))),
            MiniGroup("ffn", tuple(range(10, 10 + layers))),
            MiniGroup("attention", tuple(range(layers))),
        ]
        partition, events = Partition.of(source), []
        for number, group in enumerate(groups, 1):
            partition = remove(partition, group)
            arch = partition.architecture()
            removed = group.listed()
            scores: dict[str, float] = {group.type: 0.5 / number}
            shape, count = shape_of(arch), arch.num_parameters()
            events.append(Event(number, number, 100 * number, group.type, removed, scores, shape, count))
        config = Config()
        config = dataclasses.replace(
            config,
            prune=dataclasses.replace(config.prune, target_params=target, prune_align=8),
            data=dataclasses.replace(config.data, seq_length=10),
        )
        manifest = Manifest(
            partition,
            Progress(
                step=adam_steps + 1, adam_steps=adam_steps, consumed_samples=32, units_spent=9, events=len(events)
            ),
            dataclasses.asdict(config),
            "order",
            {"rank_00000.safetensors": "0" * 64},
            "0" * 64,
        )
        draw = torch.Generator().manual_seed(0)
        tensors = {
            (spec.name, kind): torch.randn(partition.logical_shape(spec), generator=draw)
            for spec in tensor_specs(source)
            for kind in STATE_KINDS
        }
        return HeldStates(manifest, events, tensors)

    return make
