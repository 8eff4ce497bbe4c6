"""The study's text: prepared once, its held-out part cut into samples for the loss and documents for questions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_prune.data.blend import TokenBlend
from megatron_prune.data.documents import find_inputs, stdlib_files
from megatron_prune.data.indexed import IndexedDataset, bin_path
from megatron_prune.data.preprocess import preprocess
from megatron_prune.data.samples import split_range
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.evaluation.cloze import Question, make_questions, read_questions, task_names, write_questions
from megatron_prune.study.settings import Study

BATCH = 16
_SEED = 1  # of the order of held-out samples; the same for all models


def prepare_text(study: Study, root: Path) -> str:
    """Tokenise the text unless that is done, and make the questions; returns the prefix of the data."""
    prefix = str(root / "data" / "text")
    tokenizer = load_tokenizer(study.tokenizer)
    files = find_inputs(study.input) if study.input else stdlib_files()
    preprocess(files, tokenizer, prefix, workers=1, json_key="text", overwrite=False)
    save_questions(study, prefix)
    return prefix


def data_hash(prefix: str) -> str:
    """Hash of the tokens."""
    return hashlib.sha256(bin_path(prefix).read_bytes()).hexdigest()[:16]


def held_out_documents(study: Study, prefix: str) -> list[str]:
    """Texts of the documents that lie wholly in the held-out part, in order."""
    tokenizer = load_tokenizer(study.tokenizer)
    dataset = IndexedDataset(prefix)
    first, last = split_range(dataset.num_tokens, study.split, "valid")
    texts, start = [], 0
    for index in range(len(dataset)):
        stop = start + int(dataset.sequence_lengths[index])
        if first <= start and stop <= last:
            texts.append(tokenizer.decode([token for token in dataset[index].tolist() if token != tokenizer.eod_id]))
        start = stop
    if not texts:
        raise UserError(f"split {study.split!r} holds out no whole document; give its second part more")
    return texts


def save_questions(study: Study, prefix: str) -> None:
    """Make the cloze questions of the held-out text, one file a task beside the data."""
    documents = held_out_documents(study, prefix)
    for task in task_names():
        questions = make_questions(task, documents, study.evaluation.questions, study.evaluation.seed)
        write_questions(_questions_path(prefix, task), questions)


def saved_questions(prefix: str) -> dict[str, list[Question]]:
    """What :func:`save_questions` has made, by task."""
    return {task: read_questions(_questions_path(prefix, task)) for task in task_names()}


def _questions_path(prefix: str, task: str) -> Path:
    return Path(f"{prefix}.{task}.jsonl")


def held_out_batches(study: Study, prefix: str, vocab_size: int) -> Iterator[Tensor]:
    """Samples of the held-out part, ``[batch, seq_length + 1]`` int64, each at most once."""
    length = int(study.settings["seq_length"])
    blend = TokenBlend([(1.0, prefix)], length, _SEED, study.split, "valid", vocab_size)
    total = study.evaluation.samples
    for start in range(0, total, BATCH):
        yield torch.as_tensor(blend.batch(start, min(BATCH, total - start)))
