"""Megatron's indexed dataset, ``PREFIX.bin`` and ``PREFIX.idx``, read through memory maps and written as a stream.

Layout, all little-endian (as megatron-core 0.16 reads and writes it):

* ``.bin``: the tokens of all sequences, one after another, nothing else.
* ``.idx``: ``MMIDIDX\\0\\0``, version (u64, 1), dtype code (u8), number of sequences (u64), number of document
  boundaries (u64), then the arrays: length of each sequence in tokens (i32), its byte offset in ``.bin`` (i64), and
  the sequence index at which each document begins or, for the last entry, ends (i64). Multimodal files append one
  byte per sequence, which is accepted and ignored.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_prune.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
# Codes 6 and 7 are float64 and float32, which Megatron's format allows and tokens never are.
_DTYPES: dict[int, np.dtype[np.integer]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
_LENGTH = np.dtype("<i4")
_OFFSET = np.dtype("<i8")
#: Megatron's rule: vocabularies below this fit 16 bits with room for padding rows.
UINT16_VOCAB_LIMIT = 65500
_WRITE_BLOCK = 1 << 20  # entries of an index array held in memory at once

Tokens = npt.NDArray[np.integer]


def best_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """The dtype Megatron's tools choose: uint16 for a vocabulary below 65,500, else int32."""
    return np.dtype(np.uint16) if vocab_size < UINT16_VOCAB_LIMIT else np.dtype(np.int32)


def bin_path(prefix: str) -> Path:
    """Where the tokens of a dataset lie."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str) -> Path:
    """Where the index of a dataset lies. It is written last, so its presence means a complete dataset."""
    return Path(f"{prefix}.idx")


@dataclasses.dataclass(frozen=True)
class _Index:
    """The checked content of an ``.idx`` file; the arrays are views of its memory map."""

    dtype: np.dtype[np.integer]
    lengths: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]

    @property
    def num_bytes(self) -> int:
        """Size that ``.bin`` must have."""
        return int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if len(self.lengths) else 0


def _read_index(prefix: str) -> _Index:
    """Open both files of a dataset far enough to know that they belong together. Empty ones are allowed."""
    path = idx_path(prefix)
    for needed in (path, bin_path(prefix)):
        if not needed.is_file():
            hint = " (give the prefix without .bin or .idx)" if prefix.endswith((".bin", ".idx")) else ""
            raise UserError(f"data file {needed} does not exist{hint}; make it with tools/preprocess_data.py")
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if not header.startswith(MAGIC):
        raise UserError(f"{path} is not a Megatron index: it begins with {header[: len(MAGIC)]!r}, not {MAGIC!r}")
    if len(header) < _HEADER.size:
        raise UserError(f"{path} is truncated: {size} bytes, the header alone takes {_HEADER.size}")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"{path} has index version {version}, only {VERSION} is supported; write it again")
    if code not in _DTYPES:
        raise UserError(f"{path} has dtype code {code}, which is no integer type; write the data again as tokens")
    arrays = sequences * (_LENGTH.itemsize + _OFFSET.itemsize) + boundaries * _OFFSET.itemsize
    expected = _HEADER.size + arrays
    if size not in (expected, expected + sequences):
        raise UserError(f"{path} is truncated or damaged: {size} bytes where {expected} are needed; write it again")
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    bounds = np.cumsum([_HEADER.size, sequences * _LENGTH.itemsize, sequences * _OFFSET.itemsize])
    index = _Index(
        _DTYPES[code].newbyteorder("<"),
        np.frombuffer(raw, _LENGTH, sequences, int(bounds[0])),
        np.frombuffer(raw, _OFFSET, sequences, int(bounds[1])),
        np.frombuffer(raw, _OFFSET, boundaries, int(bounds[2])),
    )
    have = bin_path(prefix).stat().st_size
    if have != index.num_bytes:
        state = "truncated" if have < index.num_bytes else "too long"
        raise UserError(
            f"{bin_path(prefix)} is {state}: {have} bytes, its index says {index.num_bytes}; copy or write it again"
        )
    return index


class IndexedDataset:
    """A Megatron dataset on disk, opened in constant time and memory.

    Args:
        prefix: path without ``.bin`` and ``.idx``.

    Raises:
        UserError: a file is missing, truncated, of another format or version, or holds no token.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._index = _read_index(prefix)
        if self._index.num_bytes == 0:
            raise UserError(f"data set {prefix} is empty: it has {len(self._index.lengths)} sequences and no token")
        self._tokens = np.memmap(bin_path(prefix), dtype=self._index.dtype, mode="r")

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._index.lengths)

    def __getitem__(self, i: int) -> Tokens:
        """Tokens of sequence ``i`` in the stored dtype, a read-only view."""
        start = int(self._index.pointers[i]) // self.dtype.itemsize
        return self._tokens[start : start + int(self._index.lengths[i])]

    @property
    def sequence_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each sequence, ``[len(self)]`` int32, a read-only view."""
        return self._index.lengths

    @property
    def document_indices(self) -> npt.NDArray[np.int64]:
        """First sequence of each document and the number of sequences, ``[documents + 1]`` int64."""
        return self._index.documents

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """Type of the stored tokens."""
        return self._index.dtype

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences together."""
        return len(self._tokens)

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """A copy of tokens ``start`` to ``stop`` of all sequences in a row, ``[stop - start]`` int64."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        return self._tokens[start:stop].astype(np.int64)


class IndexedDatasetWriter:
    """Writes a Megatron dataset document by document; memory is 4 bytes a document.

    Both files are written under temporary names and take their places in :meth:`finalize`, the index last: a dataset
    with an index is complete. Leaving the ``with`` block without it removes what was written.

    Args:
        prefix: path without ``.bin`` and ``.idx``; an older dataset there stays until :meth:`finalize`.
        dtype: type of the stored tokens, see :func:`best_dtype`.
    """

    def __init__(self, prefix: str, dtype: npt.DTypeLike) -> None:
        self._prefix = prefix
        self._code = next(code for code, kind in _DTYPES.items() if kind == np.dtype(dtype))
        self._dtype = _DTYPES[self._code].newbyteorder("<")
        # The process id keeps a writer that outlived its killed parent from touching its successor's files.
        self._temporary = f"{prefix}.tmp-{os.getpid()}"
        self._bin: BinaryIO = bin_path(self._temporary).open("wb")
        self._lengths = array("i")

    def __enter__(self) -> IndexedDatasetWriter:
        """Return the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close and remove the temporary files, if there still are any."""
        self._bin.close()
        bin_path(self._temporary).unlink(missing_ok=True)
        idx_path(self._temporary).unlink(missing_ok=True)

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Append one document of one sequence.

        Raises:
            UserError: a token does not fit the dtype.
        """
        wide = np.asarray(tokens, dtype=np.int64)
        limits = np.iinfo(self._dtype)
        if wide.size and (wide.min() < limits.min or wide.max() > limits.max):
            worst = int(wide.max() if wide.max() > limits.max else wide.min())
            raise UserError(f"token {worst} does not fit {self._dtype.name}; use best_dtype(vocabulary size)")
        self._bin.write(wide.astype(self._dtype).tobytes())
        self._lengths.append(wide.size)

    def append(self, prefix: str) -> None:
        """Append all documents of a dataset of the same dtype that has one sequence per document (it may be empty)."""
        index = _read_index(prefix)
        assert index.dtype == self._dtype, (index.dtype, self._dtype)
        assert len(index.documents) == len(index.lengths) + 1, "documents of several sequences"
        with bin_path(prefix).open("rb") as source:
            shutil.copyfileobj(source, self._bin)
        self._lengths.frombytes(index.lengths.astype(np.intc).tobytes())

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens added so far."""
        return self._bin.tell() // self._dtype.itemsize

    def finalize(self) -> None:
        """Write the index, flush everything to disk and move both files to their names."""
        _sync_and_close(self._bin)
        with idx_path(self._temporary).open("wb") as stream:
            self._write_index(stream)
            _sync_and_close(stream)
        idx_path(self._prefix).unlink(missing_ok=True)  # never an old index beside new tokens
        os.replace(bin_path(self._temporary), bin_path(self._prefix))
        os.replace(idx_path(self._temporary), idx_path(self._prefix))
        folder = os.open(Path(self._prefix).absolute().parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _write_index(self, stream: BinaryIO) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.intc)
        count = len(lengths)
        stream.write(_HEADER.pack(MAGIC, VERSION, self._code, count, count + 1))
        stream.write(lengths.astype(_LENGTH).tobytes())
        start = 0
        for first in range(0, count, _WRITE_BLOCK):
            sizes = lengths[first : first + _WRITE_BLOCK].astype(_OFFSET) * self._dtype.itemsize
            ends = start + np.cumsum(sizes)
            stream.write((ends - sizes).tobytes())
            start = int(ends[-1])
        for first in range(0, count + 1, _WRITE_BLOCK):
            stream.write(np.arange(first, min(first + _WRITE_BLOCK, count + 1), dtype=_OFFSET).tobytes())


def _sync_and_close(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
