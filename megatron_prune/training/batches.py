"""This rank's share of the global order of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor

from megatron_prune.data.blend import TokenBlend
from megatron_prune.parallel.mesh import Mesh


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
    """

    train: TokenBlend
    valid: TokenBlend | None
    micro_batch_size: int
    global_batch_size: int
    mesh: Mesh

    def training(self, consumed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``(tokens, next tokens)``, int64 ``[micro batch, seq_length]``, of the step after ``consumed`` samples."""
        return self._cut(self.train, consumed, self.global_batch_size)

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
