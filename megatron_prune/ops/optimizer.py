"""AdamW (decoupled weight decay), which every stage of the method trains with."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

#: Parameters, or groups of them as ``torch.optim`` takes them.
Params = Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]]
Adam = Callable[[Params, float, tuple[float, float], float, float], torch.optim.Optimizer]


def adam(
    params: Params, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """``torch.optim.AdamW``, one small kernel after another.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; a group's own value goes first.

    Returns:
        An optimizer whose state is ``step``, ``exp_avg`` and ``exp_avg_sq`` per parameter.
    """
    return torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False, fused=False)


def fused_adam(
    params: Params, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """:func:`adam` in one kernel per group of tensors (``fused=True``)."""
    return torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


def load_transformer_engine() -> Adam:
    """:func:`adam` through ``transformer_engine.pytorch.optimizers.FusedAdam``.

    Raises:
        ImportError: Transformer Engine is not installed.
    """
    return _adam_w(importlib.import_module("transformer_engine.pytorch.optimizers").FusedAdam)


def load_apex() -> Adam:
    """:func:`adam` through ``apex.optimizers.FusedAdam``.

    Raises:
        ImportError: NVIDIA apex or its ``amp_C`` extension is missing.
    """
    importlib.import_module("amp_C")
    return _adam_w(importlib.import_module("apex.optimizers").FusedAdam)


def _adam_w(kind: Callable[..., torch.optim.Optimizer]) -> Adam:
    decoupled = functools.partial(kind, adam_w_mode=True)

    def build(
        params: Params, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        return decoupled(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    return build
