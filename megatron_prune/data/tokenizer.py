"""Text to token ids and back: Hugging Face tokenizers and sentencepiece models behind one small interface."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from megatron_prune.errors import UserError

END_OF_TEXT = "<|endoftext|>"
#: Names of the end-of-document token, tried in this order where a tokenizer declares none.
EOD_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<eod>")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FINGERPRINT_DIGITS = 16


class Tokenizer(ABC):
    """What preprocessing and the demo need of a tokenizer. Instances can be pickled to worker processes.

    Attributes:
        name: what the user called it.
        vocab_size: one more than the highest id, added tokens included.
        eod_id: id appended to every document.
        fingerprint: hash of the content, to tell whether old results still hold.
    """

    def __init__(self, name: str, vocab_size: int, eod_id: int, content: bytes) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.eod_id = eod_id
        self.fingerprint = hashlib.sha256(content + f"{vocab_size},{eod_id}".encode()).hexdigest()[:_FINGERPRINT_DIGITS]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any beginning- or end-of-text token added."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""


class FastTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` library, from ``tokenizer.json`` or out of a Hugging Face one."""

    def __init__(self, name: str, backend: tokenizers.Tokenizer, eod_id: int) -> None:
        backend.no_truncation()
        backend.no_padding()
        super().__init__(name, max(backend.get_vocab().values()) + 1, eod_id, backend.to_str().encode())
        self._backend = backend

    def encode(self, text: str) -> list[int]:
        """See the base class."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """See the base class."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))


class SlowTokenizer(Tokenizer):
    """A Hugging Face tokenizer written in Python."""

    def __init__(self, name: str, backend: Any, eod_id: int) -> None:
        content = json.dumps([type(backend).__name__, sorted(backend.get_vocab().items())])
        super().__init__(name, max(backend.get_vocab().values()) + 1, eod_id, content.encode())
        self._backend = backend

    def encode(self, text: str) -> list[int]:
        """See the base class."""
        return list(self._backend.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """See the base class."""
        return str(self._backend.decode(list(ids)))


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece ``.model``."""

    def __init__(self, name: str, backend: sentencepiece.SentencePieceProcessor, eod_id: int) -> None:
        super().__init__(name, backend.get_piece_size(), eod_id, backend.serialized_model_proto())
        self._backend = backend

    def encode(self, text: str) -> list[int]:
        """See the base class."""
        return list(self._backend.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """See the base class."""
        return str(self._backend.decode(list(ids)))


def load_tokenizer(path: str) -> Tokenizer:
    """Open a tokenizer. Code that comes with it is never run.

    Args:
        path: a Hugging Face directory or hub id, a ``tokenizer.json``, or a sentencepiece ``.model``.

    Raises:
        UserError: it does not exist, cannot be read, or has no end-of-document token.
    """
    place = Path(path)
    if place.is_file() and place.suffix == ".model":
        return _load_sentencepiece(place)
    if place.is_file() and place.suffix == ".json":
        return _load_json(place)
    if not place.is_dir() and (place.exists() or not _HUB_ID.fullmatch(path)):
        raise UserError(
            f"unknown tokenizer {path}: no such directory, tokenizer.json or sentencepiece .model; check --tokenizer"
        )
    return _load_hugging_face(path)


def _load_sentencepiece(path: Path) -> Tokenizer:
    try:
        backend = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"tokenizer {path} is not a sentencepiece model ({_first_line(error)})") from error

    def lookup(piece: str) -> int | None:
        number = int(backend.piece_to_id(piece))
        return None if backend.is_unknown(number) else number

    declared = int(backend.eos_id())
    return SentencePieceTokenizer(str(path), backend, _find_eod(str(path), declared if declared >= 0 else None, lookup))


def _load_json(path: Path) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"tokenizer {path} is not a tokenizer.json ({_first_line(error)})") from error
    return FastTokenizer(str(path), backend, _find_eod(str(path), None, backend.token_to_id))


def _load_hugging_face(path: str) -> Tokenizer:
    # Imported here because it takes seconds, which neither workers nor the other two formats should pay.
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"unknown tokenizer {path}: transformers finds none there ({_first_line(error)}); give a directory with one"
        ) from error
    vocabulary = loaded.get_vocab()
    eod = _find_eod(path, loaded.eos_token_id, vocabulary.get)
    if loaded.is_fast:
        return FastTokenizer(path, loaded.backend_tokenizer, eod)
    return SlowTokenizer(path, loaded, eod)


def _find_eod(name: str, declared: int | None, lookup: Callable[[str], int | None]) -> int:
    if declared is not None:
        return declared
    for token in EOD_NAMES:
        number = lookup(token)
        if number is not None:
            return number
    raise UserError(
        f"tokenizer {name} has no end-of-document token: it declares no eos_token and has none of "
        f"{' '.join(EOD_NAMES)}; add one to it"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def train_bpe(texts: Iterable[str], vocab_size: int, directory: Path | str) -> Tokenizer:
    """Train a byte-level BPE and save it as a directory that ``AutoTokenizer`` and :func:`load_tokenizer` open.

    Args:
        texts: the training text; one pass.
        vocab_size: ids to end with, at least the 256 bytes and the end-of-text token.
        directory: where to save it; made if missing.

    Returns:
        The tokenizer, with ``<|endoftext|>`` (id 0) as beginning and end of text.

    Raises:
        UserError: the vocabulary is too small, or the text too short to fill it.
    """
    from transformers import PreTrainedTokenizerFast  # slow to import, see above

    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(f"vocabulary of {vocab_size} is too small: {len(alphabet)} bytes and {END_OF_TEXT} must fit")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    if model.get_vocab_size() < vocab_size:
        raise UserError(f"the text yields only {model.get_vocab_size()} of {vocab_size} tokens; give more text or less")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=model, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    wrapped.save_pretrained(str(directory))
    return load_tokenizer(str(directory))
