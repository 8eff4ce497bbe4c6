"""A rank's optimizer, and what DeepSpeed makes of its memory, as pieces of named tensors.

ZeRO-1 cuts the flat buffer of a parameter group, not tensors: a rank owns one run of a tensor's elements, or none.
DeepSpeed keeps that address on each parameter (``_hp_mapping``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_prune.model.pipeline import NamedParameter
from megatron_prune.ops.optimizer import Adam
from megatron_prune.parallel.states import MOMENTS, StateFragment, StateKind
from megatron_prune.pruning.saliency import Fragment, is_output_matrix


@dataclasses.dataclass(frozen=True)
class AdamSettings:
    """What the optimizer is built from (the learning rate is set before every step)."""

    make: Adam
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def make_optimizer(parameters: Iterable[NamedParameter], adam: AdamSettings) -> torch.optim.Optimizer:
    """Adam over a stage's parameters: matrices are decayed, vectors are not."""
    entries = list(parameters)
    groups = [
        {"params": [e.parameter for e in entries if e.parameter.dim() > 1], "weight_decay": adam.weight_decay},
        {"params": [e.parameter for e in entries if e.parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    return adam.make(groups, 0.0, adam.betas, adam.eps, adam.weight_decay)


def master_fragment(entry: NamedParameter) -> StateFragment | None:
    """This rank's piece of a parameter's fp32 master weights, a view, or None if it owns none."""
    mapping = _mapping(entry)
    if mapping is None:
        return None
    return StateFragment(entry.spec, "master", mapping.lp_fragment_address.start, mapping.get_hp_fragment().detach())


def held_states(
    parameters: Iterable[NamedParameter], moments: Iterable[StateKind]
) -> Iterator[tuple[NamedParameter, StateFragment]]:
    """This rank's pieces of the masters and of those moments, parameter by parameter; views."""
    for entry in parameters:
        master = master_fragment(entry)
        if master is not None:
            yield entry, master
            for kind in moments:
                yield entry, StateFragment(entry.spec, kind, master.start, _mapping(entry).get_hp_fragment(kind))


def output_fragments(parameters: Iterable[NamedParameter], correction: float | None) -> Iterator[Fragment]:
    """This rank's pieces of ``o_proj`` and ``down_proj`` with their reduced gradients.

    Args:
        parameters: those of the stage.
        correction: what Adam's second moment is divided by to stand for the Hessian's diagonal, NaN if there is none
            yet; None to leave the diagonal out.
    """
    for entry in parameters:
        parameter: Any = entry.parameter
        mapping = _mapping(entry)
        if mapping is None or not is_output_matrix(entry.spec):
            continue
        address = mapping.lp_fragment_address
        grad = mapping.get_lp_grad_fragment(parameter._index_in_param_group).reshape(-1)
        if grad.numel() != address.numel:  # BF16_Optimizer hands out the whole gradient
            grad = grad.narrow(0, address.start, address.numel)
        rows, columns = parameter.shape
        weight = mapping.get_hp_fragment().detach()
        diagonal = None if correction is None else _diagonal(mapping, correction)
        yield Fragment(entry.spec, weight, grad, address.start, (rows, columns), diagonal)


def make_moments(optimizer: Any, adam_steps: int) -> None:
    """Give a new optimizer zero moments that count as many steps.

    Args:
        optimizer: DeepSpeed's, around torch's.
        adam_steps: steps the moments to be filled in have seen.
    """
    inner = optimizer.optimizer
    for group in inner.param_groups:
        for flat in group["params"]:
            step = torch.tensor(float(adam_steps), device=flat.device if group.get("fused") else "cpu")
            inner.state[flat] = {"step": step}
            for kind in MOMENTS:
                inner.state[flat][kind] = torch.zeros_like(flat)
    link_moments(optimizer)


def link_moments(optimizer: Any) -> None:
    """Point DeepSpeed's fragments at the moments, which torch creates at the first step only."""
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def _mapping(entry: NamedParameter) -> Any:
    return entry.parameter._hp_mapping  # type: ignore[attr-defined]


def _diagonal(mapping: Any, correction: float) -> Tensor:
    if correction != correction:
        return torch.full_like(mapping.get_hp_fragment().detach(), torch.nan)
    moment: Tensor = mapping.get_hp_fragment("exp_avg_sq")
    return moment / correction
