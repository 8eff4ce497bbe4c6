"""One endless order of samples over several weighted datasets.

Sample ``n`` depends on the seed and on ``n`` alone. Any number of data-parallel ranks, any micro-batch size and any
restart therefore read the same samples, and a checkpoint needs to record only how many were consumed. Neither the
order nor the blend is stored: memory grows with the number of sources, not with the number of samples.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from megatron_prune.data.indexed import IndexedDataset
from megatron_prune.data.order import mix, permute
from megatron_prune.data.samples import PackedSamples, Which, parse_split, split_range
from megatron_prune.errors import UserError

# Circumference and step of the rotation that spreads the sources: Fibonacci numbers 92 and 91. Their ratio is the
# golden ratio's best approximation of that size, so the spread stays even up to 7.5e18 samples; with 2**64 as the
# circumference it is worse beyond 2**32.
_CIRCLE = 7540113804746346429
_STEP = 4660046610375530309
_PROBE_TOKENS = 4096  # read from every source at the start, so that a wrong vocabulary is found before any training
_FINGERPRINT_DIGITS = 16


def parse_data_path(args: Sequence[str]) -> list[tuple[float, str]]:
    """Weights and prefixes from the values of ``--data-path``, as in Megatron.

    Args:
        args: ``W PREFIX W PREFIX ...``, or prefixes alone, which are then weighted by their numbers of tokens.

    Raises:
        UserError: no value, a weight that is not a positive finite number, weights for some prefixes only, or, without
            weights, an unreadable dataset.
    """
    if not args:
        raise UserError("--data-path is empty; give [WEIGHT] PREFIX pairs made by tools/preprocess_data.py")
    numbers = [_number(arg) for arg in args]
    if not any(number is not None for number in numbers):
        if len(args) == 1:
            return [(1.0, args[0])]
        return [(float(IndexedDataset(prefix).num_tokens), prefix) for prefix in args]
    pairs = []
    for position in range(0, len(args), 2):
        weight = numbers[position]
        if weight is None or position + 1 == len(args):
            raise UserError(
                f"--data-path {' '.join(args)}: expected WEIGHT PREFIX pairs but {args[position]!r} stands alone; "
                "give every prefix a weight or none"
            )
        pairs.append((weight, args[position + 1]))
    _check_weights(pairs)
    return pairs


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _check_weights(sources: Sequence[tuple[float, str]]) -> None:
    for weight, prefix in sources:
        if not 0 < weight < float("inf"):
            raise UserError(f"--data-path: weight {weight:g} of {prefix} must be a positive number; leave it out at 0")


def _floor_sum(count: int, step: int, offset: int, modulus: int) -> int:
    """``sum((step * k + offset) // modulus for k in range(count))`` in a logarithmic number of operations.

    Whole multiples of the modulus in step and offset are summed directly. What is left counts the lattice points
    under a line of slope below 1; seen with the axes exchanged these are again such a sum, with step and modulus
    exchanged, so the numbers shrink as in Euclid's algorithm.
    """
    total = 0
    while True:
        total += step // modulus * (count * (count - 1) // 2) + offset // modulus * count
        step, offset = step % modulus, offset % modulus
        height, rest = divmod(step * count + offset, modulus)
        if height == 0:
            return total
        count, offset, step, modulus = height, rest, modulus, step


class GlobalOrder:
    """Which source sample ``n`` comes from and which of its samples it is.

    Sample ``n`` sits at ``start(seed) + n / golden ratio`` on a circle of circumference 1 and belongs to the source
    whose arc, as long as its share of the weights, covers that point. Multiples of the golden ratio are spread as
    evenly as points can be, so after any ``n`` samples each source is within a few samples (of the order of log n) of
    its share. How many of the first ``n`` fell on an arc has a closed form (:func:`_floor_sum`), so nothing is
    iterated. Each pass over a source is a new permutation.

    Args:
        weights: positive, one per source, of any sum.
        sizes: samples of each source, at least 1.
        seed: which order.
    """

    def __init__(self, weights: Sequence[float], sizes: Sequence[int], seed: int) -> None:
        assert len(weights) == len(sizes) > 0
        assert min(weights) > 0
        assert min(sizes) > 0
        exact = [Fraction(weight) for weight in weights]
        total = sum(exact)
        self._bounds = [round(sum(exact[:source]) / total * _CIRCLE) for source in range(len(exact) + 1)]
        self._sizes = list(sizes)
        self._seed = seed
        self._start = mix(seed) % _CIRCLE

    def source(self, n: int) -> int:
        """Index of the source of sample ``n``."""
        assert n >= 0
        return bisect_right(self._bounds, (self._start + n * _STEP) % _CIRCLE) - 1

    def count(self, source: int, n: int) -> int:
        """How many of the first ``n`` samples come from a source."""
        low, high = self._bounds[source], self._bounds[source + 1]
        start = self._start + _CIRCLE  # keeps the numerators positive; cancels in the difference
        return _floor_sum(n, _STEP, start - low, _CIRCLE) - _floor_sum(n, _STEP, start - high, _CIRCLE)

    def locate(self, n: int) -> tuple[int, int]:
        """Source of sample ``n`` and the sample's index in it."""
        source = self.source(n)
        size = self._sizes[source]
        epoch, position = divmod(self.count(source, n), size)
        return source, permute(position, size, mix(self._seed, source, epoch))


class TokenBlend:
    """The samples of one part (train, valid or test) of several datasets in one global, endless order.

    Args:
        sources: weight and prefix of each dataset, see :func:`parse_data_path`.
        seq_length: S, inputs per sample in tokens.
        seed: which order.
        split: shares of train, valid and test, e.g. ``"969,30,1"``.
        which: the part to read.
        vocab_size: the model's; every token read must be below it.

    Raises:
        UserError: an unreadable dataset, a bad split or weight, a part too short for one sample, or a token outside
            the vocabulary among the first few thousand of a source.
    """

    def __init__(
        self,
        sources: Sequence[tuple[float, str]],
        seq_length: int,
        seed: int,
        split: str,
        which: Which,
        vocab_size: int,
    ) -> None:
        _check_weights(sources)
        self._seq_length = seq_length
        self._vocab_size = vocab_size
        datasets = [IndexedDataset(prefix) for _, prefix in sources]
        self._prefixes = [prefix for _, prefix in sources]
        self._samples: list[PackedSamples] = []
        for dataset in datasets:
            self._check_tokens(dataset.prefix, dataset.tokens(0, min(_PROBE_TOKENS, dataset.num_tokens)))
            first, last = split_range(dataset.num_tokens, split, which)
            samples = PackedSamples(dataset, seq_length, first, last)
            if len(samples) == 0:
                raise UserError(
                    f"{dataset.prefix}: the {which} part has {last - first} of {dataset.num_tokens} tokens, too few "
                    f"for one sample of {seq_length} + 1; change --split {split}, --seq-length or the data"
                )
            self._samples.append(samples)
        self._order = GlobalOrder([weight for weight, _ in sources], [len(samples) for samples in self._samples], seed)
        weights = [Fraction(weight) for weight, _ in sources]
        self._identity = {
            "tokens": [dataset.num_tokens for dataset in datasets],
            "sequences": [len(dataset) for dataset in datasets],
            "weights": [str(weight / sum(weights)) for weight in weights],
            "seq_length": seq_length,
            "seed": seed,
            "split": [str(share) for share in parse_split(split)],
            "which": which,
        }

    def sample(self, n: int) -> npt.NDArray[np.int64]:
        """Sample ``n`` of the run, ``[seq_length + 1]`` int64.

        Raises:
            UserError: a token is outside the vocabulary.
        """
        source, index = self._order.locate(n)
        tokens = self._samples[source][index]
        self._check_tokens(self._prefixes[source], tokens)
        return tokens

    def batch(self, first: int, count: int) -> torch.Tensor:
        """Samples ``first`` to ``first + count`` as int64 ``[count, seq_length + 1]``."""
        return torch.from_numpy(np.stack([self.sample(n) for n in range(first, first + count)]))

    def counted(self, first: int, count: int) -> None:
        """Every target counts in the loss."""

    def fingerprint(self) -> str:
        """Hash of all that decides the order: sizes of the datasets, weights, sequence length, seed, split.

        Paths are left out, so data may move. A checkpoint records it; another value on resume means other samples.
        """
        return hashlib.sha256(json.dumps(self._identity).encode()).hexdigest()[:_FINGERPRINT_DIGITS]

    def _check_tokens(self, prefix: str, tokens: npt.NDArray[np.int64]) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocab_size:
            raise UserError(
                f"wrong vocabulary for the data: {prefix} holds token {low if low < 0 else high} but the model has "
                f"{self._vocab_size} tokens; preprocess the text with the source model's tokenizer"
            )
