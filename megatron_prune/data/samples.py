"""Fixed-length training samples cut from the concatenated documents of one dataset."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_prune.data.indexed import IndexedDataset
from megatron_prune.errors import UserError

Which = Literal["train", "valid", "test"]
_PARTS: tuple[Which, ...] = ("train", "valid", "test")


def parse_split(split: str) -> tuple[Fraction, Fraction, Fraction]:
    """Shares of the training, validation and test parts, e.g. of ``"969,30,1"``; missing ones are 0, the sum is 1.

    Raises:
        UserError: not one to three numbers of at least 0, or all of them 0.
    """
    try:
        shares = [Fraction(part.strip()) for part in split.split(",")]
    except (ValueError, ZeroDivisionError):
        shares = []
    if not 1 <= len(shares) <= len(_PARTS) or min(shares) < 0 or sum(shares) == 0:
        raise UserError(f"--split {split!r} is not one to three shares such as 969,30,1 (train, valid, test)")
    shares += [Fraction(0)] * (len(_PARTS) - len(shares))
    total = sum(shares)
    return shares[0] / total, shares[1] / total, shares[2] / total


def split_range(num_tokens: int, split: str, which: Which) -> tuple[int, int]:
    """First and one past the last token of a part. The parts are contiguous, disjoint and cover everything."""
    shares = parse_split(split)
    part = _PARTS.index(which)
    return round(num_tokens * sum(shares[:part])), round(num_tokens * sum(shares[: part + 1]))


class PackedSamples:
    """Samples of ``seq_length`` inputs and their targets from tokens ``first_token`` to ``last_token`` (exclusive).

    Documents follow one another without padding, each ended by its end-of-document token; a sample may begin and end
    inside one. Sample ``i`` is ``tokens[i * S : i * S + S + 1]``: the last target is the next sample's first input,
    so every token but the first is predicted once, except for the remainder at the end.

    Args:
        dataset: where the tokens are.
        seq_length: S, in tokens.
        first_token: where the part begins.
        last_token: one past its last token.
    """

    def __init__(self, dataset: IndexedDataset, seq_length: int, first_token: int, last_token: int) -> None:
        assert seq_length > 0
        assert 0 <= first_token <= last_token <= dataset.num_tokens, (first_token, last_token, dataset.num_tokens)
        self._dataset = dataset
        self._seq_length = seq_length
        self._first_token = first_token
        self._num_samples = max(0, (last_token - first_token - 1) // seq_length)

    def __len__(self) -> int:
        """Number of whole samples."""
        return self._num_samples

    def __getitem__(self, i: int) -> npt.NDArray[np.int64]:
        """Sample ``i``, ``[seq_length + 1]`` int64."""
        assert 0 <= i < self._num_samples, (i, self._num_samples)
        start = self._first_token + i * self._seq_length
        return self._dataset.tokens(start, start + self._seq_length + 1)
