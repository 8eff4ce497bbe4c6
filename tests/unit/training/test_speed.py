"""Throughput, MFU and ETA with a clock that the test moves."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.training.speed import ETA_WINDOW, Eta, Throughput, format_eta, peak_flops

ARCH = Architecture("llama", 2, 32, 64, 4, uniform_kv_groups(2, 4, 4), 8, 100)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-32GB", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peak_flops(name: str, flops: float | None) -> None:
    assert peak_flops(name) == flops


def test_mfu_counts_every_step_with_its_own_shape() -> None:
    clock = Clock()
    small = dataclasses.replace(ARCH, ffn_hidden_size=16)
    meter = Throughput(128, num_devices=2, peak=1e9, clock=clock)
    meter.add(1000, ARCH)
    meter.add(500, small)
    clock.now += 3.0
    speed = meter.read()
    assert speed.tokens_per_second == pytest.approx(500.0)
    flops = 1000 * ARCH.flops_per_token(128) + 500 * small.flops_per_token(128)
    assert speed.mfu == pytest.approx(flops / 3.0 / 2e9)


def test_a_read_begins_a_new_interval() -> None:
    clock = Clock()
    meter = Throughput(128, 1, None, clock)
    meter.add(1000, ARCH)
    clock.now += 1.0
    meter.read()
    meter.add(10, ARCH)
    clock.now += 2.0
    assert meter.read().tokens_per_second == pytest.approx(5.0)


def test_paused_time_does_not_count() -> None:
    clock = Clock()
    meter = Throughput(128, 1, None, clock)
    meter.add(100, ARCH)
    clock.now += 1.0
    with meter.paused():
        clock.now += 99.0
    clock.now += 1.0
    assert meter.read().tokens_per_second == pytest.approx(50.0)


def test_no_peak_no_mfu_and_no_time_no_crash() -> None:
    meter = Throughput(128, 1, None, Clock())
    meter.add(1, ARCH)
    speed = meter.read()
    assert speed.mfu is None
    assert speed.tokens_per_second > 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (45, "45s"), (59.6, "1m00s"), (725, "12m05s"), (11520, "3h12m"), (183600, "2d03h"), (-5, "0s")],
)
def test_format_eta(seconds: float, text: str) -> None:
    assert format_eta(seconds) == text


def test_eta_follows_the_recent_pace() -> None:
    clock = Clock()
    eta = Eta(clock)
    assert eta.seconds(10) is None
    for step in range(100):
        clock.now += 10.0
        eta.update(step)
    assert eta.seconds(7) == pytest.approx(70.0)
    for step in range(100, 100 + ETA_WINDOW):
        clock.now += 1.0
        eta.update(step)
    assert eta.seconds(7) == pytest.approx(7.0), "steps from before the model shrank are forgotten"
    assert eta.seconds(0) == 0.0
