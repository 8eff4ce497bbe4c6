"""Finding input files, cutting them into shards, and reading the documents of a shard."""

from __future__ import annotations

import dataclasses
import glob
import gzip
import io
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import zstandard

from megatron_prune.errors import UserError

Kind = Literal["text", "jsonl", "parquet"]

_KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_COMPRESSIONS = (".gz", ".zst")
#: Directories of the standard library that hold tests or other people's packages.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
#: A generated module with paths of the machine that built the interpreter, so different everywhere.
_NOT_SOURCE = "_sysconfigdata"
MIN_SHARD_BYTES = 4 << 20  # below this, starting and merging a shard costs more than it gains
MAX_SHARDS = 4096  # keeps the directory of shards of a terabyte small


@dataclasses.dataclass(frozen=True)
class Shard:
    """A piece of the input that one worker turns into one dataset.

    Attributes:
        kind: how the files are read.
        files: one file, or for ``text`` any number, each a document.
        start: first byte (``jsonl``) or row group (``parquet``) of the piece.
        stop: one past the last, None for the whole file.
        num_bytes: input size, for progress.
    """

    kind: Kind
    files: tuple[str, ...]
    start: int
    stop: int | None
    num_bytes: int


def find_inputs(patterns: Iterable[str]) -> list[Path]:
    """Files that the glob patterns match (``**`` crosses directories), in order, each once.

    Raises:
        UserError: a pattern matches no file.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        # A name with brackets in it is a file before it is a pattern.
        names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        files = [Path(name) for name in names if Path(name).is_file()]
        if not files:
            raise UserError(f"--input {pattern} matches no file; quote patterns and end directories with /*.ext or /**")
        found.update(dict.fromkeys(files))
    return list(found)


def stdlib_files() -> list[Path]:
    """The running interpreter's standard library: every ``.py`` but tests and installed packages, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = [path for path in files if not _NOT_STDLIB & set(path.parts) and not path.name.startswith(_NOT_SOURCE)]
    return [root / path for path in sorted(kept, key=lambda path: path.as_posix())]


def plan_shards(files: Sequence[Path], shard_bytes: int | None = None) -> list[Shard]:
    """Cut the input into shards of about ``shard_bytes``, in input order, whatever the number of workers.

    Uncompressed JSON lines are cut by bytes, parquet by row groups; a compressed file stays whole; text files are
    gathered.

    Raises:
        UserError: a parquet file cannot be read.
    """
    target = shard_bytes or max(MIN_SHARD_BYTES, sum(path.stat().st_size for path in files) // MAX_SHARDS)
    shards: list[Shard] = []
    texts: list[str] = []
    gathered = 0

    def flush() -> None:
        nonlocal gathered
        if texts:
            shards.append(Shard("text", tuple(texts), 0, None, gathered))
        texts.clear()
        gathered = 0

    for path in files:
        kind = file_kind(path)
        if kind == "text":
            texts.append(str(path))
            gathered += path.stat().st_size
            if gathered >= target:
                flush()
            continue
        flush()
        shards += _parquet_shards(path, target) if kind == "parquet" else _jsonl_shards(path, target)
    flush()
    return shards


def file_kind(path: Path) -> Kind:
    """How a file is read, by its suffix; anything unknown is plain text."""
    suffix = path.with_suffix("").suffix if path.suffix in _COMPRESSIONS else path.suffix
    return _KINDS.get(suffix, "text")


def _jsonl_shards(path: Path, target: int) -> Iterator[Shard]:
    size = path.stat().st_size
    if path.suffix in _COMPRESSIONS:
        yield Shard("jsonl", (str(path),), 0, None, size)
        return
    for start in range(0, size, target):
        stop = min(start + target, size)
        yield Shard("jsonl", (str(path),), start, stop, stop - start)


def _parquet_shards(path: Path, target: int) -> Iterator[Shard]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.ParquetFile(path).metadata
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({str(error).splitlines()[0]})") from error
    start = gathered = 0
    for group in range(metadata.num_row_groups):
        gathered += metadata.row_group(group).total_byte_size
        if gathered >= target or group + 1 == metadata.num_row_groups:
            share = path.stat().st_size * (group + 1 - start) // metadata.num_row_groups
            yield Shard("parquet", (str(path),), start, group + 1, share)
            start, gathered = group + 1, 0


def read_documents(shard: Shard, json_key: str) -> Iterator[str]:
    """The texts of a shard in order, one at a time; blank lines and null values of parquet are passed over.

    Args:
        shard: what to read.
        json_key: field of a JSON line or column of a parquet file that holds the text.

    Raises:
        UserError: a file is damaged or not UTF-8, a line is not a JSON object, or the text is missing or no string;
            the message names the file and line.
    """
    if shard.kind == "text":
        for name in shard.files:
            try:
                yield Path(name).read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{name} is not UTF-8 text (byte {error.start}); convert it or leave it out") from error
    elif shard.kind == "jsonl":
        for offset, line in _lines(shard):
            if line.strip():
                yield _parse_line(shard, offset, line, json_key)
    else:
        yield from _parquet_rows(shard, json_key)


class _ZstdFile(io.RawIOBase):
    """The uncompressed bytes of a file of any number of frames, as parallel compressors write them.

    The library's own reader takes a truncated file for a complete one; this one raises EOFError.
    """

    def __init__(self, name: str) -> None:
        self._file = open(name, "rb")  # noqa: SIM115  closed by close()
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside_frame = False
        self._pending = memoryview(b"")  # cutting a view copies nothing

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._inside_frame = False
            packed = packed or self._file.read(zstandard.DECOMPRESSION_RECOMMENDED_INPUT_SIZE)
            if not packed:
                if self._inside_frame:
                    raise EOFError("it ends inside a zstd frame")
                return 0
            self._inside_frame = True
            self._pending = memoryview(self._frame.decompress(packed))
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(name: str) -> BinaryIO:
    if name.endswith(".gz"):
        return cast(BinaryIO, gzip.open(name, "rb"))
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(name))
    return open(name, "rb")


def _lines(shard: Shard) -> Iterator[tuple[int, bytes]]:
    """Lines that begin inside the shard, each with its offset in the (uncompressed) file."""
    name = shard.files[0]
    try:
        with _open(name) as stream:
            offset = shard.start
            if offset:
                # Step back one byte: if that ends a line, ours begins at the start; if not, that line is another's.
                stream.seek(offset - 1)
                offset += len(stream.readline()) - 1
            while shard.stop is None or offset < shard.stop:
                line = stream.readline()
                if not line:
                    return
                yield offset, line
                offset += len(line)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{name} is damaged or truncated ({error}); fetch it again") from error


def _line_number(name: str, offset: int) -> int:
    """Counted only for a message, so that reading need not start at the first byte of a file."""
    with _open(name) as stream:
        number = 1
        while offset > 0:
            line = stream.readline()
            offset -= len(line)
            number += 1
        return number


def _parse_line(shard: Shard, offset: int, line: bytes, json_key: str) -> str:
    def place() -> str:
        return f"{shard.files[0]} line {_line_number(shard.files[0], offset)}"

    try:
        record = json.loads(line)
    except ValueError as error:  # malformed JSON and malformed UTF-8
        raise UserError(f"{place()} is not valid JSON ({error}); one object per line is expected") from error
    if not isinstance(record, dict):
        raise UserError(f"{place()} is a JSON {type(record).__name__}, not an object; one object per line is expected")
    if json_key not in record:
        raise UserError(f"{place()} has no key {json_key!r}, only {', '.join(record) or 'none'}; set --json-key")
    if not isinstance(record[json_key], str):
        raise UserError(f"{place()}: {json_key!r} is {type(record[json_key]).__name__}, not a string; set --json-key")
    return str(record[json_key])


def _parquet_rows(shard: Shard, json_key: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    name = shard.files[0]
    assert shard.stop is not None
    try:
        with pyarrow.parquet.ParquetFile(name) as stream:
            schema = stream.schema_arrow
            if json_key not in schema.names:
                raise UserError(f"{name} has no column {json_key!r}, only {', '.join(schema.names)}; set --json-key")
            kind = schema.field(json_key).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{name}: column {json_key!r} is {kind}, not a string; set --json-key")
            for batch in stream.iter_batches(row_groups=range(shard.start, shard.stop), columns=[json_key]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{name} is damaged ({str(error).splitlines()[0]}); fetch it again") from error
