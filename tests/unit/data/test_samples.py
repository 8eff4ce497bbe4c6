from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_prune.data.samples import PackedSamples, Which, parse_split, split_range
from megatron_prune.errors import UserError

PARTS: tuple[Which, ...] = ("train", "valid", "test")


@pytest.fixture
def dataset(tmp_path: Path) -> IndexedDataset:
    """Tokens 0 to 99 in documents of 7, so that token and position are equal."""
    with IndexedDatasetWriter(str(tmp_path / "count"), np.uint16) as writer:
        for start in range(0, 100, 7):
            writer.add_document(range(start, min(start + 7, 100)))
        writer.finalize()
    return IndexedDataset(str(tmp_path / "count"))


def test_samples_cross_documents_and_share_one_token(dataset: IndexedDataset) -> None:
    samples = PackedSamples(dataset, 8, 0, 100)
    assert len(samples) == 12  # 12 * 8 + 1 <= 100 < 13 * 8 + 1
    for i in range(len(samples)):
        assert samples[i].dtype == np.int64
        np.testing.assert_array_equal(samples[i], np.arange(8 * i, 8 * i + 9))


def test_samples_stay_in_their_part(dataset: IndexedDataset) -> None:
    samples = PackedSamples(dataset, 8, 30, 47)
    assert [samples[i][0] for i in range(len(samples))] == [30, 38]
    assert samples[1][-1] == 46
    with pytest.raises(AssertionError):
        samples[2]


@pytest.mark.parametrize(("length", "count"), [(0, 0), (1, 0), (8, 0), (9, 1), (16, 1), (17, 2)])
def test_number_of_samples(dataset: IndexedDataset, length: int, count: int) -> None:
    assert len(PackedSamples(dataset, 8, 0, length)) == count


@given(
    num_tokens=st.integers(0, 10**14),
    shares=st.lists(st.decimals(0, 1000, places=3), min_size=1, max_size=3).filter(any),
)
def test_parts_cover_everything_once_and_in_proportion(num_tokens: int, shares: list[float]) -> None:
    split = ",".join(map(str, shares))
    ranges = [split_range(num_tokens, split, which) for which in PARTS]
    assert ranges[0][0] == 0
    assert ranges[2][1] == num_tokens
    assert ranges[0][1] == ranges[1][0]
    assert ranges[1][1] == ranges[2][0]
    for (first, last), share in zip(ranges, parse_split(split), strict=True):
        assert abs(last - first - num_tokens * share) <= 1


def test_megatrons_default_split() -> None:
    assert [split_range(1000, "969, 30, 1", which) for which in PARTS] == [(0, 969), (969, 999), (999, 1000)]
    assert split_range(1000, "0.5,0.5", "valid") == (500, 1000)
    assert split_range(1000, "1", "test") == (1000, 1000)


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "1,,2", "nan,1", "inf", "1/0"])
def test_bad_split(split: str) -> None:
    with pytest.raises(UserError, match="--split"):
        parse_split(split)
