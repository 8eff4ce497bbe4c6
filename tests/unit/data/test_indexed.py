from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_prune.data.indexed import IndexedDataset, IndexedDatasetWriter, best_dtype
from megatron_prune.errors import UserError

DTYPES = (np.uint16, np.int32)


def documents(dtype: npt.DTypeLike) -> list[npt.NDArray[np.int64]]:
    """Documents of many lengths, empty ones among them, that use the whole range of the type."""
    generator = np.random.default_rng(0)
    top = int(np.iinfo(dtype).max)
    return [generator.integers(0, top, length, endpoint=True) for length in (3, 1, 0, 257, 4, 1000)] + [np.array([top])]


def write(prefix: Path, dtype: npt.DTypeLike, docs: Sequence[npt.ArrayLike]) -> str:
    with IndexedDatasetWriter(str(prefix), dtype) as writer:
        for doc in docs:
            writer.add_document(doc)
        writer.finalize()
    return str(prefix)


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_reads_what_we_write(tmp_path: Path, dtype: type[np.integer]) -> None:
    docs = documents(dtype)
    prefix = write(tmp_path / "ours", dtype, docs)
    theirs = MegatronDataset(prefix)
    assert len(theirs) == len(docs)
    for doc, read in zip(docs, theirs, strict=False):
        assert read.dtype == dtype
        np.testing.assert_array_equal(read, doc)
    np.testing.assert_array_equal(theirs.sequence_lengths, [len(doc) for doc in docs])
    np.testing.assert_array_equal(theirs.document_indices, np.arange(len(docs) + 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_what_megatron_writes(tmp_path: Path, dtype: type[np.integer]) -> None:
    docs = documents(dtype)
    prefix = str(tmp_path / "theirs")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    builder.add_document(torch.from_numpy(np.concatenate(docs[:2])), [len(doc) for doc in docs[:2]])
    for doc in docs[2:]:
        builder.add_document(torch.from_numpy(doc), [len(doc)])
    builder.finalize(f"{prefix}.idx")

    ours = IndexedDataset(prefix)
    assert len(ours) == len(docs)
    assert ours.dtype == dtype
    assert ours.num_tokens == sum(map(len, docs))
    for number, doc in enumerate(docs):
        np.testing.assert_array_equal(ours[number], doc)
    np.testing.assert_array_equal(ours.sequence_lengths, [len(doc) for doc in docs])
    np.testing.assert_array_equal(ours.document_indices, [0, 2, *range(3, len(docs) + 1)])
    stream = ours.tokens(2, ours.num_tokens - 1)
    assert stream.dtype == np.int64
    np.testing.assert_array_equal(stream, np.concatenate(docs)[2:-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_write_the_same_bytes(tmp_path: Path, dtype: type[np.integer]) -> None:
    docs = documents(dtype)
    write(tmp_path / "ours", dtype, docs)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for doc in docs:
        builder.add_document(torch.from_numpy(doc), [len(doc)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


def test_multimodal_index_is_accepted(tmp_path: Path) -> None:
    prefix = str(tmp_path / "modes")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32, multimodal=True)
    builder.add_document(torch.tensor([1, 2, 3]), [3], [0])
    builder.finalize(f"{prefix}.idx")
    np.testing.assert_array_equal(IndexedDataset(prefix)[0], [1, 2, 3])


def test_append_joins_datasets_and_empty_ones(tmp_path: Path) -> None:
    docs = documents(np.uint16)
    parts = [write(tmp_path / "a", np.uint16, docs[:3]), write(tmp_path / "b", np.uint16, [])]
    parts.append(write(tmp_path / "c", np.uint16, docs[3:]))
    write(tmp_path / "whole", np.uint16, docs)
    with IndexedDatasetWriter(str(tmp_path / "joined"), np.uint16) as writer:
        for part in parts:
            writer.append(part)
        assert writer.num_documents == len(docs)
        assert writer.num_tokens == sum(map(len, docs))
        writer.finalize()
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"joined.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()


def test_nothing_appears_before_finalize_and_nothing_is_left_without(tmp_path: Path) -> None:
    def fail(writer: IndexedDatasetWriter) -> None:
        writer.add_document([1, 2])
        assert not (tmp_path / "data.bin").exists()
        raise KeyError("interrupted")

    with IndexedDatasetWriter(str(tmp_path / "data"), np.uint16) as writer, pytest.raises(KeyError):
        fail(writer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("token", [65536, -1])
def test_token_that_does_not_fit_is_refused(tmp_path: Path, token: int) -> None:
    with (
        IndexedDatasetWriter(str(tmp_path / "data"), np.uint16) as writer,
        pytest.raises(UserError, match=f"token {token} does not fit uint16"),
    ):
        writer.add_document([1, token])


def test_best_dtype_follows_megatron() -> None:
    assert best_dtype(65499) == np.uint16
    assert best_dtype(65500) == np.int32


def damage(prefix: str, suffix: str, offset: int, value: bytes) -> None:
    with open(f"{prefix}.{suffix}", "r+b") as stream:
        stream.seek(offset)
        stream.write(value)


def cut(prefix: str, suffix: str, count: int) -> None:
    path = Path(f"{prefix}.{suffix}")
    path.write_bytes(path.read_bytes()[:-count])


class TestBadFiles:
    @pytest.fixture
    def prefix(self, tmp_path: Path) -> str:
        return write(tmp_path / "data", np.uint16, [[1, 2, 3], [4]])

    @pytest.mark.parametrize("suffix", ["bin", "idx"])
    def test_missing(self, prefix: str, suffix: str) -> None:
        Path(f"{prefix}.{suffix}").unlink()
        with pytest.raises(UserError, match=rf"data\.{suffix} does not exist"):
            IndexedDataset(prefix)

    def test_suffix_given(self, prefix: str) -> None:
        with pytest.raises(UserError, match=r"give the prefix without \.bin"):
            IndexedDataset(f"{prefix}.bin")

    def test_magic(self, prefix: str) -> None:
        damage(prefix, "idx", 0, b"TNTIDX")
        with pytest.raises(UserError, match="not a Megatron index"):
            IndexedDataset(prefix)

    def test_version(self, prefix: str) -> None:
        damage(prefix, "idx", 9, struct.pack("<Q", 2))
        with pytest.raises(UserError, match="index version 2, only 1"):
            IndexedDataset(prefix)

    @pytest.mark.parametrize("code", [6, 99])
    def test_dtype(self, prefix: str, code: int) -> None:
        damage(prefix, "idx", 17, bytes([code]))
        with pytest.raises(UserError, match=f"dtype code {code}"):
            IndexedDataset(prefix)

    @pytest.mark.parametrize("count", [1, 40, 70])
    def test_truncated_index(self, prefix: str, count: int) -> None:
        cut(prefix, "idx", count)
        with pytest.raises(UserError, match=r"data\.idx is truncated"):
            IndexedDataset(prefix)

    def test_truncated_tokens(self, prefix: str) -> None:
        cut(prefix, "bin", 2)
        with pytest.raises(UserError, match=r"data\.bin is truncated: 6 bytes, its index says 8"):
            IndexedDataset(prefix)

    def test_too_many_tokens(self, prefix: str) -> None:
        with open(f"{prefix}.bin", "ab") as stream:
            stream.write(b"xx")
        with pytest.raises(UserError, match=r"data\.bin is too long"):
            IndexedDataset(prefix)

    @pytest.mark.parametrize("docs", [[], [[]]])
    def test_empty(self, tmp_path: Path, docs: list[list[int]]) -> None:
        with pytest.raises(UserError, match="is empty"):
            IndexedDataset(write(tmp_path / "none", np.uint16, docs))
