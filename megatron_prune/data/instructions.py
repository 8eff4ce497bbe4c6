"""Instructions and their responses in Alpaca's JSON format, as prompts and as training samples.

A sample is one example: its prompt, its response, the end-of-text token, then padding. Only the tokens of the response
and the end-of-text token count in the loss. Examples are not packed together: a causal model that sees one example per
row needs no other mask, under tensor, pipeline and sequence parallelism alike, and padding behind an example changes
nothing in front of it. Where no later stage waits for a fixed length, micro-batches are cut to their longest example.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_prune.data.order import mix, permute
from megatron_prune.data.tokenizer import Tokenizer
from megatron_prune.errors import UserError

_FINGERPRINT_DIGITS: Final = 16
#: JSON can spell them one by one; UTF-8 has none.
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One entry of a file.

    Attributes:
        instruction: what to do.
        input: what to do it with; empty for most.
        output: the response; empty where only instructions are given.
    """

    instruction: str
    input: str = ""
    output: str = ""

    @property
    def prompt(self) -> str:
        """What the model reads before its response."""
        given = f"### Input:\n{self.input}\n\n" if self.input else ""
        return f"### Instruction:\n{self.instruction}\n\n{given}### Response:\n"


def read_instructions(path: Path, with_output: bool = True) -> list[Instruction]:
    """Read a JSON array (or one JSON object a line) with the keys ``instruction``, ``input`` (optional) and ``output``.

    Args:
        path: of the file.
        with_output: every entry must have a response.

    Raises:
        UserError: the file is missing or empty, or an entry is not as it should be; says which.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        entries = _array(text) if text.lstrip().startswith("[") else _lines(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no file of instructions ({error}); give Alpaca's JSON: [{{...}}, ...]") from error
    if not entries:
        raise UserError(f"{path} holds no instruction; give at least one")
    return [_parsed(f"{path}: {where}", entry, with_output) for where, entry in entries]


def _array(text: str) -> list[tuple[str, Any]]:
    return [(f"entry {number}", entry) for number, entry in enumerate(_decoded(text), start=1)]


def _lines(text: str) -> list[tuple[str, Any]]:
    """Entries with their lines; only a line feed ends one, as other separators may stand in a text as they are."""
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                entries.append((f"line {number}", _decoded(line)))
            except json.JSONDecodeError as error:  # which says line 1
                raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return entries


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _parsed(where: str, entry: object, with_output: bool) -> Instruction:
    needed = ("instruction", "output") if with_output else ("instruction",)
    values = entry if isinstance(entry, dict) else {}
    texts = {key: "" if values.get(key) is None else values[key] for key in ("instruction", "input", "output")}
    for key, text in texts.items():
        if key in needed and (not isinstance(text, str) or not text):
            raise UserError(f"{where} has no text under {key!r}; all need {' and '.join(needed)}")
        if not isinstance(text, str):
            raise UserError(
                f"{where} has a value of type {type(text).__name__} under {key!r}; give a text, or leave it out"
            )
        if _SURROGATE.search(text):
            raise UserError(f"{where} has half a surrogate pair under {key!r}, which is no text; mend or drop it")
    return Instruction(**texts)


@dataclasses.dataclass(frozen=True)
class Tokenised:
    """An example as tokens.

    Attributes:
        tokens: prompt, response and end-of-text.
        prompt_tokens: how many of them are the prompt's.
    """

    tokens: tuple[int, ...]
    prompt_tokens: int


def tokenise(example: Instruction, tokenizer: Tokenizer, longest: int) -> Tokenised | None:
    """Prompt and response apart, so that the border between them is one between tokens, as it is in generation.

    Args:
        example: with a response.
        tokenizer: the model's.
        longest: tokens to keep; a response that is too long loses its end, the end-of-text token with it.

    Returns:
        None if no token of the response is left.
    """
    prompt = tokenizer.encode(example.prompt)
    tokens = [*prompt, *tokenizer.encode(example.output), tokenizer.eod_id][:longest]
    return Tokenised(tuple(tokens), len(prompt)) if len(tokens) > len(prompt) else None


class InstructionSamples:
    """Examples in one endless order, a new permutation each time around; sample ``n`` depends on seed and ``n`` alone.

    Args:
        examples: what to train on.
        tokenizer: the model's.
        seq_length: S, inputs of a sample in tokens.
        seed: which order.
        vocab_size: the model's; every token must be below it.

    Attributes:
        shortened: examples whose response lost its end.
        dropped: examples whose prompt fills a sample.

    Raises:
        UserError: no example fits, or a token is outside the vocabulary.
    """

    def __init__(
        self, examples: Sequence[Instruction], tokenizer: Tokenizer, seq_length: int, seed: int, vocab_size: int
    ) -> None:
        self._seq_length = seq_length
        self._seed = seed
        self._fill = tokenizer.eod_id
        found = [tokenise(example, tokenizer, seq_length + 1) for example in examples]
        self._examples = [example for example in found if example is not None]
        self.dropped = len(found) - len(self._examples)
        self.shortened = sum(example.tokens[-1] != tokenizer.eod_id for example in self._examples)
        if not self._examples:
            raise UserError(
                f"--seq-length {seq_length}: the prompt alone fills it in all {len(examples)} examples; raise it"
            )
        highest = max(max(example.tokens) for example in self._examples)
        if highest >= vocab_size:
            raise UserError(
                f"the tokenizer {tokenizer.name} gives token {highest}, but the model's vocabulary has {vocab_size}; "
                "give the tokenizer that the model was trained with as --tokenizer"
            )

    def __len__(self) -> int:
        """Examples of one time around."""
        return len(self._examples)

    def batch(self, first: int, count: int) -> Tensor:
        """Samples ``first`` to ``first + count`` as int64 ``[count, seq_length + 1]``, padded with end-of-text."""
        rows = np.full((count, self._seq_length + 1), self._fill, dtype=np.int64)
        for row, example in enumerate(self._chosen(first, count)):
            rows[row, : len(example.tokens)] = example.tokens
        return torch.from_numpy(rows)

    def counted(self, first: int, count: int) -> Tensor:
        """Which targets ``batch(...)[:, 1:]`` count in the loss, boolean ``[count, seq_length]``; some in every row."""
        rows: npt.NDArray[np.bool_] = np.zeros((count, self._seq_length), dtype=bool)
        for row, example in enumerate(self._chosen(first, count)):
            rows[row, example.prompt_tokens - 1 : len(example.tokens) - 1] = True
        return torch.from_numpy(rows)

    def fingerprint(self) -> str:
        """Hash of all that decides the order and the content of the samples."""
        content = json.dumps([self._seed, self._seq_length, [dataclasses.astuple(e) for e in self._examples]])
        return hashlib.sha256(content.encode()).hexdigest()[:_FINGERPRINT_DIGITS]

    def _chosen(self, first: int, count: int) -> list[Tokenised]:
        return [self._example(number) for number in range(first, first + count)]

    def _example(self, number: int) -> Tokenised:
        epoch, position = divmod(number, len(self._examples))
        return self._examples[permute(position, len(self._examples), mix(self._seed, epoch))]


def steps_of(examples: int, epochs: float, global_batch_size: int) -> int:
    """Optimizer steps that come closest to so many times around, at least 1."""
    return max(1, round(epochs * examples / global_batch_size))
