"""Text to measure and to calibrate with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_prune.data.documents import stdlib_files
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.evaluation.offline import held_out_documents


def documents_or_held_out(files: Sequence[Path]) -> list[str]:
    """The texts of files, or of what the demo's models were not trained on where none are given.

    Raises:
        UserError: a file cannot be read.
    """
    return list(map(_read, files)) if files else held_out_documents()


def training_documents(files: Sequence[Path]) -> Iterable[str]:
    """Texts like those the demo's models were trained on: the standard library from its beginning, unless files are
    given."""
    return map(_read, files or stdlib_files())


def token_batch(
    model_dir: Path, documents: Iterable[str], samples: int, length: int, advice: str = "give more text"
) -> Tensor:
    """Tokens of documents, packed as in training, a document's end marked.

    Args:
        model_dir: whose tokenizer it is.
        documents: texts; no more are read than are needed.
        samples: rows.
        length: tokens of a row.
        advice: what to do where the text is too short.

    Returns:
        int64 ``[samples, length]``.

    Raises:
        UserError: the documents are too short, or there is no tokenizer.
    """
    tokenizer = load_tokenizer(str(model_dir))
    tokens: list[int] = []
    for text in documents:
        tokens += [*tokenizer.encode(text), tokenizer.eod_id]
        if len(tokens) >= samples * length:
            return torch.tensor(tokens[: samples * length]).view(samples, length)
    raise UserError(f"the text has {len(tokens)} tokens, {samples * length} are needed; {advice}")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"text {file} cannot be read ({error.strerror}); give files of plain text") from error
