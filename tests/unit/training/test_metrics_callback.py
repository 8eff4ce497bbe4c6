"""What a line of metrics says of the GPU's memory."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.checkpoint.manifest import Progress
from megatron_prune.config import Config
from megatron_prune.training.callbacks import Metrics
from megatron_prune.training.speed import Throughput

ARCH = Architecture("llama", 2, 16, 32, 2, uniform_kv_groups(2, 2, 2), 8, 64)


def _lines(device: str, steps: int) -> list[dict[str, Any]]:
    """Lines of a run of so many steps that logs each of them."""
    config = Config()
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, log_interval=1))
    lines: list[dict[str, Any]] = []
    reporter: Any = SimpleNamespace(log=lambda line, status: lines.append(line))
    metrics = Metrics(reporter, Throughput(8, 1, None), None)
    record: Any = SimpleNamespace(
        trained_shape=ARCH,
        compacted=False,
        deferred=None,
        lr=1e-3,
        result=SimpleNamespace(applied=True, loss=2.0, grad_norm=1.0),
    )
    for step in range(1, steps + 1):
        trainer: Any = SimpleNamespace(
            progress=Progress(step=step),
            config=config,
            tokens=step * 8,
            architecture=ARCH,
            mesh=SimpleNamespace(device=torch.device(device)),
            engine=SimpleNamespace(partition=SimpleNamespace(source=ARCH)),
        )
        metrics.after_step(trainer, record)
    return lines


def test_a_cpu_has_none() -> None:
    assert [line["memory_bytes"] for line in _lines("cpu", 1)] == [None]


def test_each_line_has_its_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [300, 200]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.pop(0))
    assert [line["memory_bytes"] for line in _lines("cuda", 2)] == [300, 200]
