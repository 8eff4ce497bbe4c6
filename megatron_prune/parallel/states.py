"""Names and pieces of the training state: what an optimizer holds of every tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from megatron_prune.architecture import TensorSpec
from megatron_prune.parallel.partition import Partition

StateKind = Literal["master", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[StateKind, ...] = ("exp_avg", "exp_avg_sq")
STATE_KINDS: tuple[StateKind, ...] = ("master", *MOMENTS)

#: Gives the logical (live) fp32 tensor of one state; called for this rank's tensors in model order.
StateSource = Callable[[TensorSpec, StateKind], Tensor]


@dataclasses.dataclass(frozen=True)
class SlicedStates:
    """A source of states that gives fragments, where nobody needs to hold a whole tensor.

    Attributes:
        fragment: of a tensor's state under a placement: tensor-parallel rank, first element in the flattened physical
            tensor, length -> fp32 ``[length]`` on the CPU, dead padding zero.
    """

    fragment: Callable[[TensorSpec, StateKind, Partition, int, int, int], Tensor]


@dataclasses.dataclass(frozen=True)
class StateFragment:
    """A rank's contiguous piece of one state of one tensor.

    Attributes:
        spec: the tensor.
        kind: fp32 master weights or a moment of AdamW.
        start: position of the first element in the flattened physical tensor.
        values: ``[numel]`` fp32, a view of the optimizer's own memory.
    """

    spec: TensorSpec
    kind: StateKind
    start: int
    values: Tensor
