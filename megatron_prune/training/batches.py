"""This rank's share of the global order of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from torch import Tensor

from megatron_prune.data.blend import TokenBlend
from megatron_prune.parallel.mesh import Mesh

#: ``tokens [B, S]`` and next tokens ``[B, S]``, int64; the latter perhaps with a teacher's hidden states ``[B, S, D]``.
Sample = tuple[Tensor, Tensor | tuple[Tensor, Tensor]]


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

    train: TokenBlend
    valid: TokenBlend | None
    micro_batch_size: int
    global_batch_size: int
    mesh: Mesh
    teacher: Callable[[Iterator[tuple[Tensor, Tensor]]], Iterator[Sample]] | None = None

    @property
    def per_copy(self) -> int:
        """Micro-batches of a step on every copy of the model."""
        return self.global_batch_size // (self.micro_batch_size * self.mesh.dp_size)

    def training(self, consumed: int) -> Iterator[Sample]:
        """``(tokens, next tokens)``, int64 ``[micro batch, seq_length]``, of the step after ``consumed`` samples."""
        plain = self._cut(self.train, consumed, self.global_batch_size)
        return plain if self.teacher is None else self.teacher(plain)

    def calibration(self, consumed: int, samples: int) -> Iterator[tuple[Tensor, Tensor]]:
        """So many samples, which the micro-batches of all copies divide, without a teacher."""
        return self._cut(self.train, consumed, samples)

    def validation(self, iters: int) -> tuple[Iterator[tuple[Tensor, Tensor]], int]:
        """The same first ``iters`` global batches of the validation part each time, and how many micro-batches."""
        assert self.valid is not None, "the run has no validation part"
        samples = iters * self.global_batch_size
        return self._cut(self.valid, 0, samples), samples // (self.micro_batch_size * self.mesh.dp_size)

    def _cut(self, blend: TokenBlend, first: int, samples: int) -> Iterator[tuple[Tensor, Tensor]]:
        stride = self.micro_batch_size * self.mesh.dp_size
        own = first + self.mesh.dp_rank * self.micro_batch_size
        for start in range(own, first + samples, stride):
            tokens = blend.batch(start, self.micro_batch_size).to(self.mesh.device, non_blocking=True)
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
