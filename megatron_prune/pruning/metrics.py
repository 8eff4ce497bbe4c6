"""Element-wise saliency scores (method table; LLM-Pruner names in brackets).

``taylor`` [``param_first``] is ``|w * g|``: the first-order term of the paper's Eq. 9 with the abs taken per element,
as LLM-Pruner's code does by default. ``magnitude`` is ``|w|``. ``random`` is a hash of the seed and reads no weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Metric = Literal["taylor", "magnitude", "random"]


def taylor(weight: Tensor, grad: Tensor) -> Tensor:
    """``|w * g|`` in fp32 or wider: bf16 products would flip decisions."""
    wide = torch.promote_types(torch.promote_types(weight.dtype, grad.dtype), torch.float32)
    return (weight.to(wide) * grad.to(wide)).abs_()


def magnitude(weight: Tensor, grad: Tensor) -> Tensor:
    """``|w|``; the gradient is not read."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).abs()


def elementwise(metric: Metric) -> Callable[[Tensor, Tensor], Tensor]:
    """The score function of a metric that reads weights (every one but ``random``)."""
    return {"taylor": taylor, "magnitude": magnitude}[metric]
