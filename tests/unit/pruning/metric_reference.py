"""Every metric of method.md in plain float64, on top of the brute-force model of reference.py.

Shares no code with the package: whole matrices, whole inputs, explicit inverses.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DAMPING = 0.01


def reference_class() -> Any:
    """``Reference`` of reference.py."""
    path = Path(__file__).with_name("reference.py")
    spec = importlib.util.spec_from_file_location("brute_force_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Reference


def inverse_hessian(x: Tensor) -> Tensor:
    """Inverse of the damped ``X X^T`` of inputs ``[tokens, columns]``."""
    h = x.T @ x
    return torch.linalg.inv(h + DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype))


def layer_inputs(reference: Any, tokens: Tensor) -> dict[str, Tensor]:
    """``[tokens, in]`` of every projection, by its name without ``.weight``."""
    inputs: dict[str, Tensor] = {}
    project = type(reference)._project

    def recording(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
        inputs[name] = x.detach().reshape(-1, x.shape[-1])
        return project(reference, x, w, name)

    reference._project = recording
    try:
        reference.loss(tokens)
    finally:
        del reference._project
    return inputs


def measure(
    reference: Any, metric: str, gradients_of: list[dict[str, Tensor]], inputs: dict[str, Tensor]
) -> tuple[list[list[float]], list[list[float]], list[float]]:
    """``heads [L][H], ffn [L][F], stem [D]`` by one metric; kept for ``reference.decide``.

    Args:
        reference: the model.
        metric: a name of method.md.
        gradients_of: the gradients of every micro-batch.
        inputs: see :func:`layer_inputs`.
    """
    heads: list[list[float]] = []
    ffn: list[list[float]] = []
    stem = torch.zeros(reference.hidden_size, dtype=torch.float64)
    for layer in range(reference.num_layers):
        for name in (f"model.layers.{layer}.self_attn.o_proj", f"model.layers.{layer}.mlp.down_proj"):
            w = reference.weights[name + ".weight"]
            gradients = torch.stack([part[name + ".weight"] for part in gradients_of])
            g, h = gradients.mean(0), gradients.square().mean(0)
            width = reference.head_dim if name.endswith("o_proj") else 1
            if metric == "obc":
                inverse = inverse_hessian(inputs[name])
                rows = (w**2 / inverse.diagonal()).sum(1)
                columns = []
                for first in range(0, w.shape[1], width):
                    block = slice(first, first + width)
                    columns.append(float(torch.trace(w[:, block] @ inverse[block, block].inverse() @ w[:, block].T)))
            else:
                score = {
                    "taylor": (w * g).abs(),
                    "taylor-mixed": (-w * g + w**2 * h / 2).abs(),
                    "diag-hessian": w**2 * h / 2,
                    "vectorize": w * g,
                    "wanda": w.abs() * inputs[name].norm(dim=0),
                    "magnitude": w.abs(),
                }[metric]
                rows = score.sum(1)
                columns = score.sum(0).view(-1, width).sum(1).tolist()
            stem += rows
            (heads if name.endswith("o_proj") else ffn).append(columns)
    found = (heads, ffn, stem.tolist())
    if metric == "vectorize":
        found = ([[abs(s) for s in row] for row in heads], [[abs(s) for s in row] for row in ffn], stem.abs().tolist())
    reference._sums = found
    return [list(row) for row in found[0]], [list(row) for row in found[1]], list(found[2])
