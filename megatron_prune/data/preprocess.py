"""Text files to one indexed dataset: parallel, restartable, and the same bytes for any number of workers.

The input is cut into shards. Each becomes a small dataset in ``PREFIX.parts/`` under a name that hashes everything it
depends on (files, sizes, times, tokenizer, key), and all of them are joined in input order at the end. A run that was
killed leaves its finished shards; the next one finds them by name and makes the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from megatron_prune.data.documents import Shard, plan_shards, read_documents
from megatron_prune.data.indexed import IndexedDataset, IndexedDatasetWriter, best_dtype, bin_path, idx_path
from megatron_prune.data.tokenizer import Tokenizer
from megatron_prune.errors import MegatronPruneError, UserError

_FORMAT = 1  # part of every hash; raise it when the same input gives other tokens
_DIGEST_DIGITS = 20


@dataclasses.dataclass(frozen=True)
class PreprocessResult:
    """What a run did.

    Attributes:
        documents: documents in the dataset.
        tokens: tokens in the dataset, end-of-document tokens included.
        shards: pieces the input was cut into.
        reused: pieces taken over from an interrupted run.
        already_complete: the dataset was there, made from the same input and settings; nothing was done.
    """

    documents: int
    tokens: int
    shards: int
    reused: int
    already_complete: bool


@dataclasses.dataclass(frozen=True)
class _Job:
    shard: Shard
    prefix: str


def sidecar_path(prefix: str) -> Path:
    """JSON file beside a dataset: tokenizer, vocab_size, eod_id, dtype, documents, tokens and the input's hash."""
    return Path(f"{prefix}.json")


def preprocess(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    output_prefix: str,
    *,
    workers: int = 1,
    json_key: str = "text",
    overwrite: bool = False,
    shard_bytes: int | None = None,
) -> PreprocessResult:
    """Tokenize files into ``output_prefix.bin/.idx``, an end-of-document token after every document.

    Empty documents are left out. Memory holds one document a worker and 4 bytes for every document.

    Args:
        files: in the order in which the documents shall follow one another.
        tokenizer: pickled once to each worker.
        output_prefix: path without ``.bin`` and ``.idx``; its directory is made.
        workers: processes; 1 works in this one.
        json_key: field or column that holds the text.
        overwrite: replace a dataset that is there already.
        shard_bytes: size of a piece; by default 4 MiB, more when there would be over 4096 pieces.

    Raises:
        UserError: bad input (see :func:`read_documents`), no text at all, or a dataset of other input in the way.
    """
    if workers < 1:
        raise UserError(f"--workers {workers} must be at least 1")
    if not Path(output_prefix).name or output_prefix.endswith("/") or Path(output_prefix).is_dir():
        raise UserError(
            f"--output-prefix {output_prefix} is a directory; add a file name without suffix, as in out/wiki"
        )
    jobs = _plan(files, tokenizer, output_prefix, json_key, shard_bytes)
    digest = _hash([Path(job.prefix).name for job in jobs])
    parts = _parts_dir(output_prefix)
    if not overwrite:
        complete = _check_existing(output_prefix, digest, len(jobs))
        if complete is not None:
            shutil.rmtree(parts, ignore_errors=True)  # of a run that was killed after its last rename
            return complete
    parts.mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not idx_path(job.prefix).exists()]
    try:
        _tokenize_all(missing, jobs, tokenizer, json_key, workers)
        result = _merge(jobs, tokenizer, output_prefix, digest, reused=len(jobs) - len(missing))
    except UserError:
        with contextlib.suppress(OSError):
            parts.rmdir()  # only if nothing was finished
        raise
    shutil.rmtree(parts, ignore_errors=True)  # a killed run's last worker may write there for a moment yet
    return result


def _parts_dir(output_prefix: str) -> Path:
    return Path(f"{output_prefix}.parts")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:_DIGEST_DIGITS]


def _plan(
    files: Sequence[Path], tokenizer: Tokenizer, output_prefix: str, json_key: str, shard_bytes: int | None
) -> list[_Job]:
    jobs = []
    for number, shard in enumerate(plan_shards(files, shard_bytes)):
        states = [os.stat(name) for name in shard.files]
        inputs = [(name, state.st_size, state.st_mtime_ns) for name, state in zip(shard.files, states, strict=True)]
        key = None if shard.kind == "text" else json_key
        digest = _hash([_FORMAT, tokenizer.fingerprint, key, shard.kind, inputs, shard.start, shard.stop])
        jobs.append(_Job(shard, str(_parts_dir(output_prefix) / f"{number:06d}-{digest}")))
    return jobs


def _check_existing(output_prefix: str, digest: str, shards: int) -> PreprocessResult | None:
    """The result if the dataset is there and still right, None if there is none."""
    has_index, has_tokens = idx_path(output_prefix).exists(), bin_path(output_prefix).exists()
    interrupted = not has_index and _parts_dir(output_prefix).exists()  # killed between the last two renames
    if interrupted or not (has_index or has_tokens):
        return None
    sidecar = sidecar_path(output_prefix)
    recorded: dict[str, Any] = {}
    if sidecar.exists():
        with contextlib.suppress(ValueError):  # an unreadable sidecar vouches for nothing
            recorded = json.loads(sidecar.read_text())
    if recorded.get("input_hash") != digest or not has_index:
        existing = idx_path(output_prefix) if has_index else bin_path(output_prefix)
        raise UserError(
            f"{existing} exists and was not made from this input with these settings; "
            "use another --output-prefix, or --overwrite to replace it"
        )
    dataset = IndexedDataset(output_prefix)  # raises if it was truncated since
    return PreprocessResult(len(dataset), dataset.num_tokens, shards, reused=0, already_complete=True)


def _tokenize_all(
    missing: Sequence[_Job], jobs: Sequence[_Job], tokenizer: Tokenizer, json_key: str, workers: int
) -> None:
    total = sum(job.shard.num_bytes for job in jobs)
    todo = sum(job.shard.num_bytes for job in missing)
    run = _in_processes if min(workers, len(missing)) > 1 else _in_this_process
    # disable=None: no bar unless standard error is a terminal.
    with tqdm(total=total, initial=total - todo, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        for job in run(missing, tokenizer, json_key, workers):
            bar.update(job.shard.num_bytes)


def _in_this_process(jobs: Sequence[_Job], tokenizer: Tokenizer, json_key: str, workers: int) -> Iterator[_Job]:
    assert workers == 1 or len(jobs) <= 1
    for job in jobs:
        _tokenize(job, tokenizer, json_key)
        yield job


def _tokenize(job: _Job, tokenizer: Tokenizer, json_key: str) -> None:
    with IndexedDatasetWriter(job.prefix, best_dtype(tokenizer.vocab_size)) as writer:
        for text in read_documents(job.shard, json_key):
            ids = tokenizer.encode(_without_lone_surrogates(text))
            if ids:
                writer.add_document([*ids, tokenizer.eod_id])
        writer.finalize()


def _without_lone_surrogates(text: str) -> str:
    """JSON can spell half a surrogate pair, which no tokenizer takes; it becomes U+FFFD, as in decoded text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _in_processes(jobs: Sequence[_Job], tokenizer: Tokenizer, json_key: str, workers: int) -> Iterator[_Job]:
    """Let processes take jobs from a shared counter; yields each job when it is done.

    Raises:
        UserError: what a worker raised.
        MegatronPruneError: a worker died.
    """
    context = multiprocessing.get_context("spawn")  # forking a process whose tokenizer has threads may hang
    counter = context.Value("q", 0)
    processes = {}
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (theirs, counter, jobs, tokenizer, json_key)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that the end of the worker is the end of the pipe
            processes[ours] = process
        running = dict(processes)
        while running:
            for ready in cast(list[Connection], wait(list(running))):
                try:
                    message = ready.recv()
                except EOFError:
                    process = running.pop(ready)
                    process.join()
                    if process.exitcode:
                        raise MegatronPruneError(
                            f"a tokenizing process ended with exit code {process.exitcode} (-9: killed, often for lack "
                            "of memory; use fewer --workers); the same command continues"
                        ) from None
                    continue
                if isinstance(message, UserError):
                    raise message
                yield jobs[message]
    finally:
        for process in processes.values():
            process.terminate()
            process.join()


def _work(results: Connection, counter: Any, jobs: Sequence[_Job], tokenizer: Tokenizer, json_key: str) -> None:
    """A worker's life: take the next job until none is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        with counter.get_lock():
            number = counter.value
            counter.value += 1
        if number >= len(jobs):
            return
        try:
            _tokenize(jobs[number], tokenizer, json_key)
            results.send(number)
        except UserError as error:
            results.send(error)
            return


def _end_with_parent() -> None:
    """End this process at once when its parent was killed: a successor may be at work on the same shards."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _merge(
    jobs: Sequence[_Job], tokenizer: Tokenizer, output_prefix: str, digest: str, *, reused: int
) -> PreprocessResult:
    with IndexedDatasetWriter(output_prefix, best_dtype(tokenizer.vocab_size)) as writer:
        for job in jobs:
            writer.append(job.prefix)
        documents, tokens = writer.num_documents, writer.num_tokens
        if tokens == 0:
            raise UserError("the input holds no text: every document is empty; check --input and --json-key")
        # The index says that all is complete, so it goes first and comes last.
        idx_path(output_prefix).unlink(missing_ok=True)
        _write_sidecar(tokenizer, output_prefix, digest, documents, tokens)
        writer.finalize()
    return PreprocessResult(documents, tokens, len(jobs), reused, already_complete=False)


def _write_sidecar(tokenizer: Tokenizer, output_prefix: str, digest: str, documents: int, tokens: int) -> None:
    sidecar = {
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "dtype": best_dtype(tokenizer.vocab_size).name,
        "documents": documents,
        "tokens": tokens,
        "input_hash": digest,
    }
    temporary = sidecar_path(f"{output_prefix}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(sidecar, indent=2) + "\n")
    os.replace(temporary, sidecar_path(output_prefix))
