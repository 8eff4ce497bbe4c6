from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_prune.data.indexed import IndexedDataset
from megatron_prune.data.preprocess import preprocess
from megatron_prune.data.tokenizer import Tokenizer
from megatron_prune.errors import MegatronPruneError, UserError

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "two", "owls", "watch")
SHARD_BYTES = 500
OUTPUTS = ("bin", "idx", "json")

# Tokenizes as the given tokenizer does, but slowly enough to be killed on the way.
SLOW_RUN = """
import sys, time
from pathlib import Path
from megatron_prune.data.preprocess import preprocess
from megatron_prune.data.tokenizer import FastTokenizer, load_tokenizer

class Slow(FastTokenizer):
    def encode(self, text):
        time.sleep(0.02)
        return super().encode(text)

if __name__ == "__main__":
    path, prefix, workers, shard_bytes, *files = sys.argv[1:]
    tokenizer = load_tokenizer(path)
    tokenizer.__class__ = Slow
    preprocess([Path(f) for f in files], tokenizer, prefix, workers=int(workers), shard_bytes=int(shard_bytes))
"""


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Two files of JSON lines with 60 documents each and 10 text files."""
    generator = random.Random(0)
    folder = tmp_path / "in"
    folder.mkdir()
    files = []
    for number in range(2):
        files.append(folder / f"{number}.jsonl")
        texts = [" ".join(generator.choices(WORDS, k=generator.randint(1, 30))) for _ in range(60)]
        files[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for number in range(10):
        files.append(folder / f"{number}.txt")
        files[-1].write_text(" ".join(generator.choices(WORDS, k=20)))
    return files


def texts_of(files: list[Path]) -> list[str]:
    texts = []
    for path in files:
        content = path.read_text()
        texts += [json.loads(line)["text"] for line in content.splitlines()] if path.suffix == ".jsonl" else [content]
    return texts


def finished_shards(prefix: Path) -> list[Path]:
    return sorted(path for path in Path(f"{prefix}.parts").glob("*.idx") if ".tmp-" not in path.name)


def content(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in OUTPUTS]


def test_every_document_in_order_with_its_end(tmp_path: Path, corpus: list[Path], tokenizer: Tokenizer) -> None:
    result = preprocess(corpus, tokenizer, str(tmp_path / "out/deep/data"), shard_bytes=SHARD_BYTES)
    dataset = IndexedDataset(str(tmp_path / "out/deep/data"))
    texts = texts_of(corpus)
    assert len(dataset) == len(texts) == result.documents == 130
    for document, text in zip((dataset[i] for i in range(len(dataset))), texts, strict=True):
        assert document.tolist() == [*tokenizer.encode(text), tokenizer.eod_id]
    assert result.tokens == dataset.num_tokens
    assert result.shards > 20
    assert dataset.dtype == np.uint16
    sidecar = json.loads((tmp_path / "out/deep/data.json").read_text())
    assert sidecar["documents"] == 130
    assert sidecar["tokens"] == dataset.num_tokens
    assert (sidecar["vocab_size"], sidecar["eod_id"]) == (tokenizer.vocab_size, tokenizer.eod_id)
    assert sorted(path.name for path in (tmp_path / "out/deep").iterdir()) == ["data.bin", "data.idx", "data.json"]


def test_workers_and_shards_do_not_matter(tmp_path: Path, corpus: list[Path], tokenizer: Tokenizer) -> None:
    preprocess(corpus, tokenizer, str(tmp_path / "one"), workers=1, shard_bytes=SHARD_BYTES)
    preprocess(corpus, tokenizer, str(tmp_path / "two"), workers=2, shard_bytes=SHARD_BYTES)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    preprocess(corpus, tokenizer, str(tmp_path / "whole"))
    assert content(tmp_path / "whole")[:2] == content(tmp_path / "one")[:2]


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_run_continues(
    tmp_path: Path, repo_root: Path, corpus: list[Path], tokenizer: Tokenizer, workers: int
) -> None:
    prefix = tmp_path / "killed"
    script = tmp_path / "slow_run.py"
    script.write_text(SLOW_RUN)
    arguments = [tokenizer.name, str(prefix), str(workers), str(SHARD_BYTES), *map(str, corpus)]
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    process = subprocess.Popen([sys.executable, str(script), *arguments], env=environment)
    deadline = time.monotonic() + 60
    while len(finished_shards(prefix)) < 3:
        assert process.poll() is None, "it finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path(f"{prefix}.idx").exists()
    result = preprocess(corpus, tokenizer, str(prefix), shard_bytes=SHARD_BYTES)
    assert 3 <= result.reused < result.shards
    assert not result.already_complete

    preprocess(corpus, tokenizer, str(tmp_path / "whole"), shard_bytes=SHARD_BYTES)
    assert content(prefix) == content(tmp_path / "whole")


def test_half_written_shard_is_made_again(tmp_path: Path, corpus: list[Path], tokenizer: Tokenizer) -> None:
    bad = tmp_path / "in/bad.jsonl"
    bad.write_text("{")
    prefix = tmp_path / "data"
    with pytest.raises(UserError, match=r"bad\.jsonl line 1"):
        preprocess([*corpus, bad], tokenizer, str(prefix), shard_bytes=SHARD_BYTES)
    finished = finished_shards(prefix)
    finished[0].unlink()  # as if it had been killed between the tokens and the index
    bad.write_text("")
    result = preprocess([*corpus, bad], tokenizer, str(prefix), shard_bytes=SHARD_BYTES)
    assert result.reused == len(finished) - 1
    preprocess([*corpus, bad], tokenizer, str(tmp_path / "whole"), shard_bytes=SHARD_BYTES)
    assert content(prefix) == content(tmp_path / "whole")


def test_finished_shards_of_changed_input_are_not_reused(
    tmp_path: Path, corpus: list[Path], tokenizer: Tokenizer
) -> None:
    bad = tmp_path / "in/bad.jsonl"
    bad.write_text("{")
    prefix = str(tmp_path / "data")
    with pytest.raises(UserError):
        preprocess([*corpus, bad], tokenizer, prefix, shard_bytes=10**6)
    changed = corpus[2].read_text()[::-1]  # of the same size
    corpus[2].write_text(changed)
    bad.write_text(json.dumps({"text": "mended"}) + "\n")
    result = preprocess([*corpus, bad], tokenizer, prefix, shard_bytes=10**6)
    assert result.reused == result.shards - 2
    assert IndexedDataset(prefix)[120].tolist() == [*tokenizer.encode(changed), tokenizer.eod_id]
    assert len(IndexedDataset(prefix)) == 131


def test_complete_output_is_kept_overwritten_or_protected(
    tmp_path: Path, corpus: list[Path], tokenizer: Tokenizer
) -> None:
    prefix = str(tmp_path / "data")
    first = preprocess(corpus, tokenizer, prefix)
    stamp = os.stat(f"{prefix}.bin").st_mtime_ns
    again = preprocess(corpus, tokenizer, prefix)
    assert again.already_complete
    assert (again.documents, again.tokens) == (first.documents, first.tokens)
    assert os.stat(f"{prefix}.bin").st_mtime_ns == stamp

    with pytest.raises(UserError, match=r"data\.idx exists and was not made from this input.*--overwrite"):
        preprocess(corpus[:1], tokenizer, prefix)
    assert IndexedDataset(prefix).num_tokens == first.tokens

    assert preprocess(corpus[:1], tokenizer, prefix, overwrite=True).documents == 60
    assert len(IndexedDataset(prefix)) == 60


def test_run_killed_between_the_last_renames_continues(
    tmp_path: Path, corpus: list[Path], tokenizer: Tokenizer
) -> None:
    prefix = tmp_path / "data"
    preprocess(corpus, tokenizer, str(prefix))
    before = content(prefix)
    Path(f"{prefix}.idx").unlink()
    with pytest.raises(UserError, match=r"data\.bin exists"):  # nothing says that this file was ours
        preprocess(corpus, tokenizer, str(prefix))
    Path(f"{prefix}.parts").mkdir()
    assert not preprocess(corpus, tokenizer, str(prefix)).already_complete
    assert content(prefix) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_mistake_in_the_input_leaves_no_output(
    tmp_path: Path, corpus: list[Path], tokenizer: Tokenizer, workers: int
) -> None:
    with corpus[1].open("a") as stream:
        stream.write('{"text": oops}\n')
    with pytest.raises(UserError, match=r"1\.jsonl line 61 is not valid JSON"):
        preprocess(corpus, tokenizer, str(tmp_path / "data"), workers=workers, shard_bytes=SHARD_BYTES)
    assert not any(Path(f"{tmp_path / 'data'}.{suffix}").exists() for suffix in OUTPUTS)


class DyingTokenizer(Tokenizer):
    """Ends its process, as the kernel does when memory runs out."""

    def encode(self, text: str) -> list[int]:
        """Never returns."""
        os.kill(os.getpid(), signal.SIGKILL)
        return []

    def decode(self, ids: object) -> str:
        """Not used."""
        raise NotImplementedError


def test_dead_worker_is_reported(tmp_path: Path, corpus: list[Path]) -> None:
    dying = DyingTokenizer("dying", 300, 0, b"")
    with pytest.raises(MegatronPruneError, match="exit code -9") as caught:
        preprocess(corpus, dying, str(tmp_path / "data"), workers=2, shard_bytes=SHARD_BYTES)
    assert not isinstance(caught.value, UserError)


def test_workers_end_with_a_killed_parent(
    tmp_path: Path, repo_root: Path, corpus: list[Path], tokenizer: Tokenizer
) -> None:
    """They hold its output, so its end is theirs; left alone they would take hours."""
    script = tmp_path / "slow_run.py"
    script.write_text(SLOW_RUN.replace("0.02", "3600"))
    arguments = [tokenizer.name, str(tmp_path / "data"), "2", str(SHARD_BYTES), *map(str, corpus)]
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    process = subprocess.Popen([sys.executable, str(script), *arguments], env=environment, stdout=subprocess.PIPE)
    parts = tmp_path / "data.parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*.tmp-*.bin"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=30)


def test_empty_documents_are_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": "a"}\n')
    assert preprocess([path], tokenizer, str(tmp_path / "data")).documents == 1
    path.write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="holds no text"):
        preprocess([path], tokenizer, str(tmp_path / "other"))
    assert not (tmp_path / "other.bin").exists()


def test_lone_surrogate_becomes_a_replacement_character(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude42"}\n')
    preprocess([path], tokenizer, str(tmp_path / "data"))
    assert tokenizer.decode(IndexedDataset(str(tmp_path / "data"))[0][:-1].tolist()) == "a\ufffdb 🙂"


@pytest.mark.parametrize(("prefix", "workers"), [("folder", 1), ("new/", 1), ("data", 0)])
def test_bad_settings(tmp_path: Path, corpus: list[Path], tokenizer: Tokenizer, prefix: str, workers: int) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="--output-prefix|--workers"):
        preprocess(corpus, tokenizer, f"{tmp_path}/{prefix}", workers=workers)


class TestTool:
    @staticmethod
    def run(repo_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(repo_root / "tools/preprocess_data.py"), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(repo_root)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    def test_writes_and_then_says_that_all_is_done(
        self, tmp_path: Path, repo_root: Path, corpus: list[Path], tokenizer: Tokenizer
    ) -> None:
        arguments = ["--input", f"{tmp_path}/in/*.jsonl", "--tokenizer", tokenizer.name]
        arguments += ["--output-prefix", f"{tmp_path}/data", "--workers", "1"]
        done = self.run(repo_root, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "120 documents" in done.stdout
        assert len(IndexedDataset(f"{tmp_path}/data")) == 120
        again = self.run(repo_root, *arguments)
        assert again.returncode == 0
        assert "already complete" in again.stdout

    def test_mistake_is_one_line_and_exit_code_2(self, tmp_path: Path, repo_root: Path, tokenizer: Tokenizer) -> None:
        arguments = ["--tokenizer", tokenizer.name, "--output-prefix", f"{tmp_path}/data"]
        wrong = self.run(repo_root, "--input", f"{tmp_path}/*.jsonl", *arguments)
        assert wrong.returncode == 2
        assert wrong.stderr.count("\n") == 1
        assert "matches no file" in wrong.stderr
        assert list(tmp_path.iterdir()) == []
