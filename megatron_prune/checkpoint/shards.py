"""One shard: a safetensors file with the live elements of one rank's fragments.

Under the key ``kind/logical name`` it holds a flat fp32 tensor: of a fragment, the elements whose keeper the rank is,
in the order of the physical tensor. The metadata say which run of the flattened physical tensor that is. The file is
written and read element by element here, since safetensors' own writer wants all tensors in memory at once and its
reader whole tensors: this one streams, takes the checksum on the way, and reads runs of a tensor.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prune.checkpoint.files import json_object, short, whole_number

ELEMENT_BYTES = 4  # everything is fp32
_LENGTH_BYTES = 8  # of the header's length, little-endian
_MAX_HEADER = 100_000_000  # safetensors' own limit
_METADATA = "__metadata__"
_BLOCK = 1 << 22  # small enough to be in the cache still when its checksum follows its writing
_MAX_TENSOR_PARALLEL = 1 << 16

assert sys.byteorder == "little", "safetensors are little-endian, and tensors are written as they lie in memory"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a shard to be written.

    Attributes:
        key: ``kind/logical name``.
        start: first element of the fragment in the flattened physical tensor.
        numel: length of the fragment.
        kept: elements stored of it.
        values: gives them, ``[kept]`` fp32 on the CPU; called once, when their turn has come.
    """

    key: str
    start: int
    numel: int
    kept: int
    values: Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of a shard to be read.

    Attributes:
        shard: the file.
        tp_rank: whose physical tensor the fragment is of.
        start: first element of the fragment in the flattened physical tensor.
        numel: length of the fragment.
        kept: elements stored of it.
        offset: position of the first of them in the file, in bytes.
    """

    shard: Path
    tp_rank: int
    start: int
    numel: int
    kept: int
    offset: int

    def read(self, first: int, count: int) -> Tensor:
        """Stored elements ``first`` to ``first + count``: fp32 ``[count]``.

        Raises:
            OSError: the file cannot be read, or became shorter.
        """
        assert 0 <= first <= first + count <= self.kept
        values = torch.empty(count, dtype=torch.float32)
        view = values.numpy().data.cast("B") if count else memoryview(b"")
        with self.shard.open("rb", buffering=0) as file:
            file.seek(self.offset + ELEMENT_BYTES * first)
            done = 0
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise OSError(f"{self.shard} became shorter while it was read")
                done += got
        return values


def write_shard(path: Path, entries: Sequence[Entry], tp_rank: int) -> str:
    """Write a shard and wait until the disk has it; one entry's values are in memory at a time.

    Args:
        path: of the file.
        entries: in the order of the file.
        tp_rank: whose fragments they are.

    Returns:
        The file's sha256.

    Raises:
        OSError: the disk is full, say.
    """
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:

        def put(content: memoryview) -> None:
            for begin in range(0, len(content), _BLOCK):
                block = content[begin : begin + _BLOCK]
                digest.update(block)
                while block:
                    block = block[file.write(block) :]

        put(memoryview(_header(entries, tp_rank)))
        for entry in entries:
            values = entry.values()
            assert (values.dtype, values.shape) == (torch.float32, (entry.kept,)), entry.key
            if entry.kept:
                put(values.contiguous().numpy().data.cast("B"))
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_header(path: Path) -> dict[str, Piece]:
    """The tensors of a shard by key, checked against the file's size; reads nothing but the header.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no shard of ours.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        begin = _LENGTH_BYTES + length
        if size < _LENGTH_BYTES or begin > size or length > _MAX_HEADER:
            raise ValueError(f"its header of {length} bytes does not fit its {size} bytes")
        header = dict(json_object(file.read(length)))
    tp_rank, places = _placement(header.pop(_METADATA, None))
    if places.keys() != header.keys():
        raise ValueError("its header and its list of fragments name different tensors")
    pieces, end = {}, 0
    for key, field in sorted(header.items(), key=_begin_of):
        kept, end = _extent(key, field, end)
        start, numel = _place_of(key, places[key])
        if kept > numel:
            raise ValueError(f"it stores {kept} elements of {numel} in {short(key)}")
        pieces[key] = Piece(path, tp_rank, start, numel, kept, begin + end - ELEMENT_BYTES * kept)
    if begin + end != size:
        raise ValueError(f"it has {size} bytes, its header says {begin + end}")
    return pieces


def _header(entries: Sequence[Entry], tp_rank: int) -> bytes:
    places = {entry.key: [entry.start, entry.numel] for entry in entries}
    assert len(places) == len(entries), "two fragments of one tensor"
    header: dict[str, Any] = {_METADATA: {"fragments": json.dumps(places), "tp_rank": str(tp_rank)}}
    end = 0
    for entry in entries:
        begin, end = end, end + ELEMENT_BYTES * entry.kept
        header[entry.key] = {"dtype": "F32", "shape": [entry.kept], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # the data are aligned
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _placement(metadata: object) -> tuple[int, dict[str, Any]]:
    if not isinstance(metadata, dict):
        raise ValueError("its header has no metadata")
    text, places = metadata.get("tp_rank"), metadata.get("fragments")
    if not (isinstance(text, str) and text.isascii() and text.isdigit() and int(text[:9]) < _MAX_TENSOR_PARALLEL):
        raise ValueError(f"its tensor parallel rank is {short(text)}")
    if not isinstance(places, str):
        raise ValueError("its header does not say which fragments it holds")
    return int(text[:9]), dict(json_object(places.encode()))


def _begin_of(item: tuple[str, Any]) -> int:
    key, field = item
    offsets = field.get("data_offsets") if isinstance(field, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"its entry of {short(key)} has no offsets")
    # Empty tensors come before what begins at the same place.
    return 2 * whole_number(offsets[0], f"the offset of {short(key)}") + (offsets[0] != offsets[1])


def _extent(key: str, field: dict[str, Any], previous: int) -> tuple[int, int]:
    """Elements of a tensor and where its data end, which must begin where those of the one before ended."""
    begin, end = field["data_offsets"]
    shape = field.get("shape")
    if field.get("dtype") != "F32" or not isinstance(shape, list) or len(shape) != 1:
        raise ValueError(f"{short(key)} is no flat fp32 tensor")
    kept = whole_number(shape[0], f"the length of {short(key)}")
    if begin != previous or end != begin + ELEMENT_BYTES * kept:
        raise ValueError(f"the data of {short(key)} are not where its shape says")
    return kept, begin + ELEMENT_BYTES * kept


def _place_of(key: str, place: object) -> tuple[int, int]:
    if not isinstance(place, list) or len(place) != 2:
        raise ValueError(f"the fragment of {short(key)} is {short(place)}")
    start, numel = (whole_number(number, f"the fragment of {short(key)}") for number in place)
    return start, numel
