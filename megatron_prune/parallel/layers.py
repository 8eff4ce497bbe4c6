"""Linear layers split over the tensor-parallel processes, after Megatron-LM (Shoeybi et al. 2019, section 3).

A block (attention or MLP) enters once, multiplies by column-parallel weights, works on its own heads or channels,
multiplies by one row-parallel weight and leaves once: two collectives per block and direction. Sequence parallelism
(Korthikanti et al. 2022, section 4.2) cuts what lies between blocks along the sequence, and each all-reduce into a
reduce-scatter and an all-gather of the same total size.

Shapes: ``B`` batch, ``S`` whole sequence, ``D`` hidden; ``[B, S | S/tp, D]`` is the whole sequence without, and this
rank's contiguous part of it with sequence parallelism.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_prune.parallel.matmul import linear

# torch 2.13 gave these two their present names and warns about the former ones, the only ones before it.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclasses.dataclass(frozen=True)
class TensorParallel:
    """This process's place among the processes that split every layer.

    Under sequence parallelism whatever computes on a sequence part (norm gains, the bias of a
    :class:`RowParallelLinear`) gets a *partial* gradient on each rank: the engine sums these over ``group`` once per
    step. Without it such gradients are whole and the same on every rank.

    Attributes:
        rank: position in the group.
        size: number of processes; 1 means that nothing is split and no collective runs.
        group: these processes; None iff ``size == 1``.
        sequence_parallel: keep only ``S / size`` positions per rank between blocks.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, f"rank {self.rank} of {self.size}"
        assert (self.group is None) == (self.size == 1), "a group exactly where there is something to split"

    def enter(self, x: Tensor) -> Tensor:
        """What the column-parallel layers of a block multiply; call it once per block.

        Args:
            x: ``[B, S | S/size, D]``, replicated or this rank's part of the sequence.

        Returns:
            ``[B, S, D]``, the same on every rank. Its gradients, partial per rank, are summed in the backward pass.
        """
        if self.size == 1:
            return x
        entered: Tensor = (_GatherSequence if self.sequence_parallel else _SumGradient).apply(x, self)
        return entered

    def leave(self, x: Tensor) -> Tensor:
        """Sum the partial outputs of a row-parallel layer over the ranks.

        Args:
            x: ``[B, S, D]``, this rank's addend. ``size`` must divide ``S`` under sequence parallelism.

        Returns:
            The sum, ``[B, S | S/size, D]``.
        """
        if self.size == 1:
            return x
        left: Tensor = (_ScatterSequence if self.sequence_parallel else _Sum).apply(x, self)
        return left


class ColumnParallelLinear(nn.Linear):
    """This rank's output features of a linear layer.

    ``weight`` is ``[out/size, in]`` (padding included) and ``bias`` ``[out/size]``. The forward pass is the plain
    product: its input must have gone through :meth:`TensorParallel.enter`, which layers with the same input share.
    They share the product too, see :func:`~megatron_prune.parallel.matmul.linear_together`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out/size]``."""
        return linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Linear):
    """This rank's input features of a linear layer; the outputs are summed over the ranks.

    ``weight`` is ``[out, in/size]``. ``bias`` ``[out]`` is whole on every rank and added once, after the sum; under
    sequence parallelism its gradient is partial (see :class:`TensorParallel`).
    """

    def __init__(self, in_local: int, out: int, bias: bool, tp: TensorParallel) -> None:
        """Make the layer.

        Args:
            in_local: input features of this rank.
            out: output features, all of them.
            bias: whether there is one.
            tp: who sums.
        """
        super().__init__(in_local, out, bias=bias)
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, in/size]`` to ``[B, S | S/size, out]``."""
        if self.tp.size == 1:
            return linear(x, self.weight, self.bias)
        total = self.tp.leave(linear(x, self.weight))
        return total if self.bias is None else total + self.bias


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.tp), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        return _summed(x, tp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return _gathered(x, tp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _scattered(grads[0], ctx.tp), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return _scattered(x, tp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gathered(grads[0], ctx.tp), None


def _summed(x: Tensor, tp: TensorParallel) -> Tensor:
    # A copy: the caller, or another branch of the backward pass, may still read x.
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=tp.group)
    return total


def _gathered(x: Tensor, tp: TensorParallel) -> Tensor:
    """``[B, s, ...]`` per rank to ``[B, size * s, ...]``, in rank order."""
    parts = x.new_empty((tp.size, *x.shape))  # flat for the collective: gloo takes no dimension of its own
    _all_gather(parts.flatten(0, 1), x.contiguous(), group=tp.group)
    return parts.transpose(0, 1).flatten(1, 2)


def _scattered(x: Tensor, tp: TensorParallel) -> Tensor:
    """``[B, S, ...]`` addends to this rank's ``[B, S / size, ...]`` of the sum."""
    length = x.shape[1]
    assert length % tp.size == 0, f"a sequence of {length} does not divide over {tp.size} sequence-parallel ranks"
    # Collectives cut the leading dimension; the sequence is the second (no copy where B == 1).
    parts = x.unflatten(1, (tp.size, length // tp.size)).transpose(0, 1).contiguous()
    mine = torch.empty_like(parts[0])
    _reduce_scatter(mine, parts.flatten(0, 1), op=dist.ReduceOp.SUM, group=tp.group)
    return mine
