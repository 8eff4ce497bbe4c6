"""This rank's share of the global order of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

from megatron_prune.parallel.linear_loss import IGNORED
from megatron_prune.parallel.mesh import Mesh

#: ``tokens [B, S]`` and what :func:`~megatron_prune.model.pipeline.build_pipeline`'s loss compares with.
Sample = tuple[Tensor, Tensor | tuple[Tensor, Tensor]]


class Samples(Protocol):
    """An endless order of samples."""

    def batch(self, first: int, count: int) -> Tensor:
        """Samples ``first`` to ``first + count``, int64 ``[count, seq_length + 1]``."""

    def counted(self, first: int, count: int) -> Tensor | None:
        """Which targets of them count in the loss, boolean ``[count, seq_length]``, some in every row; None: all."""

    def fingerprint(self) -> str:
        """Hash of all that decides the order."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """Cuts global batches into micro-batches and hands out this rank's.

    Which samples a global batch holds depends on the consumed count alone, never on the number of copies.

    Attributes:
        train: endless training samples.
        valid: validation samples, or None when the run never validates.
        micro_batch_size: samples per forward pass.
        global_batch_size: samples per optimizer step.
        mesh: tells this rank's share.
        teacher: adds hidden states to the micro-batches of a step, or None (``--distill-weight``).
    """

    train: Samples
    valid: Samples | None
    micro_batch_size: int
    global_batch_size: int
    mesh: Mesh
    teacher: Callable[[Iterator[Sample]], Iterator[Sample]] | None = None

    @property
    def per_copy(self) -> int:
        """Micro-batches of a step on every copy of the model."""
        return self.global_batch_size // (self.micro_batch_size * self.mesh.dp_size)

    def training(self, consumed: int) -> Iterator[Sample]:
        """``(tokens, next tokens)``, int64 ``[micro batch, seq_length]``, of the step after ``consumed`` samples.

        Where not every target counts, the others are ``IGNORED`` and the tokens come with the mean number of those that
        do in a micro-batch of the step: its losses then add up to the mean over the targets of the global batch.
        """
        plain = self._cut(self.train, consumed, self.global_batch_size)
        return plain if self.teacher is None else self.teacher(plain)

    def calibration(self, consumed: int, samples: int) -> Iterator[Sample]:
        """So many samples, which the micro-batches of all copies divide, without a teacher."""
        return self._cut(self.train, consumed, samples)

    def validation(self, iters: int) -> tuple[Iterator[Sample], int]:
        """The same first ``iters`` global batches of the validation part each time, and how many micro-batches."""
        assert self.valid is not None, "the run has no validation part"
        samples = iters * self.global_batch_size
        return self._cut(self.valid, 0, samples), samples // (self.micro_batch_size * self.mesh.dp_size)

    def _cut(self, order: Samples, first: int, samples: int) -> Iterator[Sample]:
        stride = self.micro_batch_size * self.mesh.dp_size
        own = first + self.mesh.dp_rank * self.micro_batch_size
        counted = order.counted(first, samples)
        mean = None if counted is None else counted.sum().float() * self.micro_batch_size / samples
        for start in range(own, first + samples, stride):
            batch = order.batch(start, self.micro_batch_size).to(self.mesh.device, non_blocking=True)
            tokens, labels = batch[:, :-1], batch[:, 1:]
            if counted is None or mean is None:
                yield tokens.contiguous(), labels.contiguous()
                continue
            kept = counted[start - first : start - first + self.micro_batch_size]
            length = self._length(kept)
            labels = labels.masked_fill(~kept.to(self.mesh.device), IGNORED)
            yield tokens[:, :length].contiguous(), (labels[:, :length].contiguous(), mean.to(self.mesh.device))

    def _length(self, counted: Tensor) -> int:
        """How much of the samples to compute: up to the last target that counts, unless stages expect all of it."""
        seq_length = counted.shape[1]
        if self.mesh.pp_size > 1:
            return seq_length
        needed = int(counted.any(dim=0).nonzero().max()) + 1
        size = self.mesh.tp_size  # sequence parallelism splits the sequence evenly
        return min(seq_length, -(-needed // size) * size)
