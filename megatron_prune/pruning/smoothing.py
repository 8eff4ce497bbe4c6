"""``--saliency-ema``: decide by an exponential mean of the saliency of the steps that prune, not by one batch alone."""

from __future__ import annotations

import base64
import dataclasses

import numpy as np

from megatron_prune.architecture import Architecture
from megatron_prune.pruning.saliency import FloatArray, SaliencyVectors


@dataclasses.dataclass(frozen=True)
class Average:
    """Exponential mean of saliency vectors, in source coordinates, corrected for its zero start as Adam's moments are.

    Attributes:
        beta: weight of what came before, between 0 and 1.
        measured: vectors that are in it.
        total: ``[layers * heads + layers * channels + hidden]`` fp64, heads first; finite everywhere.
    """

    beta: float
    measured: int
    total: FloatArray

    @classmethod
    def empty(cls, beta: float, source: Architecture) -> Average:
        """Of nothing yet."""
        return cls(beta, 0, np.zeros(_length(source)))

    @classmethod
    def from_text(cls, beta: float, source: Architecture, text: str) -> Average:
        """What :meth:`to_text` wrote.

        Raises:
            ValueError: it is no such text, or of another model.
        """
        count, _, packed = text.partition(":")
        if not (count.isascii() and count.isdigit() and len(count) <= _MOST_DIGITS):
            raise ValueError("the mean saliency counts nothing")
        content = base64.b64decode(packed, validate=True)
        if len(content) != 8 * _length(source):
            raise ValueError(f"the mean saliency has {len(content)} bytes, not those of {_length(source)} groups")
        total = np.frombuffer(content, "<f8")
        if not np.isfinite(total).all():
            raise ValueError("the mean saliency is not finite")
        return cls(beta, int(count), total)

    def to_text(self) -> str:
        """For a checkpoint's manifest: how many, and the values to the bit."""
        return f"{self.measured}:{base64.b64encode(self.total.astype('<f8').tobytes()).decode()}"

    def including(self, vectors: SaliencyVectors) -> Average:
        """The mean with one more measurement; what is gone adds nothing."""
        flat = np.concatenate([vectors.heads.reshape(-1), vectors.ffn.reshape(-1), vectors.stem])
        total = self.beta * self.total + (1 - self.beta) * np.where(np.isfinite(flat), flat, 0.0)
        return Average(self.beta, self.measured + 1, total)

    def of(self, vectors: SaliencyVectors) -> SaliencyVectors:
        """The mean in place of a measurement that is in it; ``inf`` stays where the unit is gone."""
        mean = self.total / (1 - self.beta**self.measured)
        parts = np.split(mean, np.cumsum([vectors.heads.size, vectors.ffn.size]))
        heads, ffn, stem = (
            np.where(np.isinf(now), np.inf, part.reshape(now.shape))
            for now, part in zip((vectors.heads, vectors.ffn, vectors.stem), parts, strict=True)
        )
        return SaliencyVectors(heads, ffn, stem, vectors.finite)


#: More measurements than a run can make.
_MOST_DIGITS = 12


def _length(source: Architecture) -> int:
    return source.num_layers * (source.num_attention_heads + source.ffn_hidden_size) + source.hidden_size
