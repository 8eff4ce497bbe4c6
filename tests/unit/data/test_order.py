from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prune.data.order import mix, permute


@settings(max_examples=60)
@given(size=st.integers(1, 700), seed=st.integers(0, 2**63))
def test_permute_is_a_bijection(size: int, seed: int) -> None:
    assert sorted(permute(index, size, seed) for index in range(size)) == list(range(size))


@given(size=st.integers(1, 10**15), seed=st.integers(0, 2**63), data=st.data())
def test_permute_stays_in_any_range_and_keeps_neighbours_apart(size: int, seed: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    image = permute(index, size, seed)
    assert 0 <= image < size
    if index + 1 < size:
        assert permute(index + 1, size, seed) != image


def test_permute_depends_on_the_seed() -> None:
    orders = {tuple(permute(index, 50, seed) for index in range(50)) for seed in range(200)}
    assert len(orders) == 200


def test_permute_looks_random() -> None:
    size = 5000
    order = np.array([permute(index, size, 1) for index in range(size)])
    # Chance gives a correlation of 1 / sqrt(size) = 0.014, and neighbours a third of the range apart on average.
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.06
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06
    assert np.abs(np.diff(order)).mean() == pytest.approx(size / 3, rel=0.05)


def test_mix_is_the_same_in_another_process() -> None:
    code = "from megatron_prune.data.order import mix, permute; print(mix(1, 2, 3), permute(7, 1000, 5))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == [str(mix(1, 2, 3)), str(permute(7, 1000, 5))]


def test_mix_tells_order_and_length_apart() -> None:
    values = [mix(), mix(0), mix(0, 0), mix(1, 0), mix(0, 1), mix(-1), mix(2**64 + 5)]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**64 for value in values)
