from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prune.data.documents import find_inputs, plan_shards, read_documents, stdlib_files
from megatron_prune.errors import UserError

TEXTS = ["first", "second\nline", "", "vierter é 漢字", "x" * 300]


def read_all(files: list[Path], json_key: str = "text", shard_bytes: int | None = None) -> list[str]:
    return [text for shard in plan_shards(files, shard_bytes) for text in read_documents(shard, json_key)]


def json_lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, key: text}) + "\n" for n, text in enumerate(texts)).encode()


def write(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = b"".join(zstandard.compress(part) for part in (content[:30], b"", content[30:]))
    path.write_bytes(content)
    return path


def write_parquet(path: Path, texts: list[str | None], key: str = "text", rows: int = 2) -> Path:
    table = pyarrow.table({"id": list(range(len(texts))), key: pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "ndjson", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("key", ["text", "content"])
def test_json_lines(tmp_path: Path, suffix: str, key: str) -> None:
    assert read_all([write(tmp_path / f"a.{suffix}", json_lines(TEXTS, key))], key) == TEXTS


def test_blank_lines_and_a_missing_last_newline(tmp_path: Path) -> None:
    content = b"\n" + json_lines(["a"]) + b"  \n\n" + json_lines(["b"]).rstrip()
    assert read_all([write(tmp_path / "a.jsonl", content)]) == ["a", "b"]


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(0, 60), max_size=30), shard_bytes=st.integers(1, 200))
def test_cutting_json_lines_anywhere_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_bytes: int
) -> None:
    texts = [f"{number}:" + "y" * length for number, length in enumerate(lengths)]
    path = write(tmp_path_factory.mktemp("cut") / "a.jsonl", json_lines(texts))
    assert read_all([path], shard_bytes=shard_bytes) == texts


@pytest.mark.parametrize("shard_bytes", [1, None])
def test_parquet(tmp_path: Path, shard_bytes: int | None) -> None:
    path = write_parquet(tmp_path / "a.parquet", [*TEXTS[:2], None, *TEXTS[2:]])
    assert read_all([path], shard_bytes=shard_bytes) == TEXTS
    assert len(plan_shards([path], shard_bytes)) == (3 if shard_bytes else 1)


def test_text_files_are_documents_and_are_gathered(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{number}.md", text.encode()) for number, text in enumerate(["a\r\n", "b", "c"])]
    assert read_all(files) == ["a\r\n", "b", "c"]
    assert [len(shard.files) for shard in plan_shards(files)] == [3]
    assert [len(shard.files) for shard in plan_shards(files, 4)] == [2, 1]


def test_kinds_mix_in_input_order(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "a.txt", b"one"),
        write(tmp_path / "b.jsonl", json_lines(["two"])),
        write(tmp_path / "c.py", b"three"),
        write_parquet(tmp_path / "d.parquet", ["four"]),
        write(tmp_path / "e.txt", b"five"),
    ]
    assert read_all(files) == ["one", "two", "three", "four", "five"]


class TestFindInputs:
    def test_patterns_in_order_without_repeats(self, tmp_path: Path) -> None:
        for name in ("b.txt", "a.txt", "sub/c.txt", "odd[1].txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        found = find_inputs([f"{tmp_path}/b*", f"{tmp_path}/**/*.txt", f"{tmp_path}/odd[1].txt"])
        names = [path.relative_to(tmp_path).as_posix() for path in found]
        assert names == ["b.txt", "a.txt", "odd[1].txt", "sub/c.txt"]

    @pytest.mark.parametrize("pattern", ["none-*.txt", ""])
    def test_no_match(self, tmp_path: Path, pattern: str) -> None:
        (tmp_path / "a.txt").touch()
        with pytest.raises(UserError, match="matches no file"):  # a directory is not one
            find_inputs([f"{tmp_path}/a.txt", f"{tmp_path}/{pattern}"])


class TestMistakes:
    @pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
    @pytest.mark.parametrize("shard_bytes", [10, None])
    def test_malformed_json_names_file_and_line(self, tmp_path: Path, suffix: str, shard_bytes: int | None) -> None:
        path = write(tmp_path / f"a.{suffix}", json_lines(["a", "b"]) + b'\n{"text": oops}\n' + json_lines(["c"]))
        with pytest.raises(UserError, match=rf"a\.{suffix} line 4 is not valid JSON"):
            read_all([path], shard_bytes=shard_bytes)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b'{"body": "x"}', "line 2 has no key 'text', only body; set --json-key"),
            (b"{}", "line 2 has no key 'text', only none"),
            (b'{"text": 5}', "line 2: 'text' is int, not a string"),
            (b'{"text": null}', "line 2: 'text' is NoneType"),
            (b'["text"]', "line 2 is a JSON list, not an object"),
            (b'{"text": "\xff"}', "line 2 is not valid JSON"),
        ],
    )
    def test_unusable_line(self, tmp_path: Path, line: bytes, message: str) -> None:
        with pytest.raises(UserError, match=message):
            read_all([write(tmp_path / "a.jsonl", json_lines(["a"]) + line + b"\n")])

    @pytest.mark.parametrize("suffix", [".gz", ".zst"])
    def test_truncated_compression(self, tmp_path: Path, suffix: str) -> None:
        lines = json_lines(["a"] * 100)[:-1] + b" " * 5000 + b"\n"  # what is lost need not show as malformed JSON
        path = write(tmp_path / f"a.jsonl{suffix}", lines)
        whole = path.read_bytes()
        for missing in (1, 20):
            path.write_bytes(whole[:-missing])
            with pytest.raises(UserError, match="damaged or truncated"):
                read_all([path])

    @pytest.mark.parametrize("suffix", [".gz", ".zst"])
    def test_not_compressed_at_all(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(json_lines(["a"]))
        with pytest.raises(UserError, match="damaged or truncated"):
            read_all([path])

    def test_not_utf8(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"a\.txt is not UTF-8 text \(byte 2\)"):
            read_all([write(tmp_path / "a.txt", b"ab\xff")])

    def test_not_parquet(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="not a readable parquet file"):
            read_all([write(tmp_path / "a.parquet", b"PAR1 no")])

    def test_parquet_without_the_column(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", ["a"], key="content")
        with pytest.raises(UserError, match="no column 'text', only id, content; set --json-key"):
            read_all([path])
        with pytest.raises(UserError, match="column 'id' is int64, not a string"):
            read_all([path], "id")


def test_stdlib_files() -> None:
    files = stdlib_files()
    names = {path.name for path in files}
    assert {"argparse.py", "dataclasses.py", "topics.py"} <= names
    assert files == stdlib_files()
    assert len(files) == len(set(files))
    parts = {part for path in files for part in path.parts[-4:]}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    assert 5e6 < sum(path.stat().st_size for path in files) < 30e6
    for path in files:
        path.read_bytes().decode("utf-8")
