"""Smoothing and clipping before 8-bit quantisation, the two ideas of OmniQuant, found by search on calibration text.

*Smoothing* moves the size of outlier channels from activations into weights: what makes an activation is divided by a
positive scale per channel, and the linear layers that read it are multiplied by it. In exact arithmetic the model stays
what it was. *Clipping* cuts a weight row at a share of its largest element, so that the row's scale gets finer; it does
change the model, by less than it spares the quantised one.

OmniQuant learns both by gradients. Here every scale is one of a few powers and every clip one of a few shares, the one
that brings the quantised layer's outputs closest to the layer's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

#: How far scales go from weights alone (0) to activations alone (1); no smoothing is tried besides.
STRENGTHS: Final = (0.25, 0.5, 0.75)
#: Shares of a row's largest element that it may be cut at.
CLIPS: Final = (1.0, 0.975, 0.95, 0.925, 0.9, 0.85, 0.8, 0.75)
LEVELS: Final = 127  # of 8 bits, symmetric
_SMALLEST: Final = 1e-5  # a channel below it never mattered, and dividing by it would overflow


@dataclasses.dataclass(frozen=True)
class Site:
    """An activation between what makes it and what reads it.

    Attributes:
        name: of the first reader, e.g. ``model.layers.0.self_attn.q_proj``.
        makers: parameters whose first dimension is the activation's channels.
        readers: linear layers that take the activation.
        repeat: consecutive heads of readers' inputs that share a head of the maker (grouped-query attention); else 1.
        head_dim: channels of a head where ``repeat`` counts, else 1.
    """

    name: str
    makers: tuple[nn.Parameter, ...]
    readers: tuple[nn.Linear, ...]
    repeat: int = 1
    head_dim: int = 1


@dataclasses.dataclass(frozen=True)
class Smoothed:
    """What :func:`smooth` did: how many sites there are, and at how many scales were better than none."""

    num_sites: int
    num_scaled: int


def sites(model: Any) -> Iterator[Site]:
    """Every activation of a decoder of the Llama kind that can be smoothed: four a layer.

    Args:
        model: Llama, Mistral, Qwen2, Qwen3 or Seed-OSS of transformers, weights in fp32.
    """
    for index, layer in enumerate(model.model.layers):
        attention, mlp, name = layer.self_attn, layer.mlp, f"model.layers.{index}"
        readers = attention.q_proj, attention.k_proj, attention.v_proj
        yield Site(f"{name}.self_attn.q_proj", (layer.input_layernorm.weight,), readers)
        repeat = attention.o_proj.in_features // attention.v_proj.out_features
        made = _parameters(attention.v_proj)
        yield Site(f"{name}.self_attn.o_proj", made, (attention.o_proj,), repeat, attention.head_dim)
        gain = (layer.post_attention_layernorm.weight,)
        yield Site(f"{name}.mlp.gate_proj", gain, (mlp.gate_proj, mlp.up_proj))
        # The gate goes through the activation function, the other factor is linear in its weights.
        yield Site(f"{name}.mlp.down_proj", _parameters(mlp.up_proj), (mlp.down_proj,))


@torch.no_grad()
def fold(site: Site, scale: Tensor) -> None:
    """Divide an activation by a scale where it is made, and multiply by it where it is read. Changes the model's
    parameters, and its outputs by no more than rounding.

    Args:
        site: from :func:`sites`.
        scale: ``[channels of the maker]``, positive.
    """
    for parameter in site.makers:
        parameter.div_(scale.view(-1, *[1] * (parameter.dim() - 1)))
    for linear in site.readers:
        linear.weight.mul_(_repeated(site, scale))


@torch.no_grad()
def smooth(model: Any, tokens: Tensor) -> Smoothed:
    """Smooth a model in place.

    Args:
        model: see :func:`sites`.
        tokens: int64 ``[batch, length]``, calibration text.
    """
    found = list(sites(model))
    inputs = _inputs(model, {site.name: site.readers[0] for site in found}, tokens)
    scaled = 0
    for site in found:
        scale = _best_scale(site, inputs[site.name])
        if scale is not None:
            fold(site, scale)
            scaled += 1
    return Smoothed(len(found), scaled)


@torch.no_grad()
def clip(model: Any, tokens: Tensor) -> float:
    """Clip the weight rows of all linear layers but the head, in place.

    Args:
        model: see :func:`sites`.
        tokens: int64 ``[batch, length]``, calibration text.

    Returns:
        The share of rows that were cut.
    """
    cut = total = 0
    found = list(sites(model))
    inputs = _inputs(model, {site.name: site.readers[0] for site in found}, tokens)
    for site in found:
        gram = inputs[site.name].T @ inputs[site.name]
        for linear in site.readers:
            shares = _best_clips(linear.weight, gram)
            limit = shares * linear.weight.abs().amax(1)
            linear.weight.copy_(linear.weight.clamp(-limit[:, None], limit[:, None]))
            cut, total = cut + int((shares < 1).sum()), total + len(shares)
    return cut / total


def rounded(values: Tensor) -> Tensor:
    """What 8 bits leave of a matrix with one symmetric scale per row: weights per output channel, activations per
    token. ``[rows, columns]`` to the same."""
    scale = values.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny) / LEVELS
    return (values / scale).round() * scale


def _parameters(linear: nn.Linear) -> tuple[nn.Parameter, ...]:
    return tuple(linear.parameters())


def _repeated(site: Site, scale: Tensor) -> Tensor:
    """A maker's scale for every input channel of the readers."""
    return scale.view(-1, 1, site.head_dim).expand(-1, site.repeat, -1).reshape(-1)


def _shared(site: Site, sizes: Tensor) -> Tensor:
    """The largest over the channels that share one of the maker: the inverse of :func:`_repeated`."""
    return sizes.view(-1, site.repeat, site.head_dim).amax(1).reshape(-1)


def _best_scale(site: Site, inputs: Tensor) -> Tensor | None:
    """The scale that brings the quantised readers closest to themselves; None where none does better than no scale."""
    active = _shared(site, inputs.abs().amax(0)).clamp_min(_SMALLEST)
    weights = torch.cat([linear.weight for linear in site.readers])
    heavy = _shared(site, weights.abs().amax(0)).clamp_min(_SMALLEST)
    wanted = inputs @ weights.T
    best, least = None, _error(inputs, weights, wanted)
    for strength in STRENGTHS:
        scale = active**strength / heavy ** (1 - strength)
        scale = scale / scale.log().mean().exp()  # sizes stay where they were on the whole
        wide = _repeated(site, scale)
        error = _error(inputs / wide, weights * wide, wanted)
        if error < least:
            best, least = scale, error
    return best


def _error(inputs: Tensor, weights: Tensor, wanted: Tensor) -> float:
    return float((rounded(inputs) @ rounded(weights).T - wanted).square().sum())


def _best_clips(weight: Tensor, gram: Tensor) -> Tensor:
    """For every row, the share of its largest element to cut it at: ``[rows]``.

    The error of a row's outputs over the calibration tokens is a quadratic form of its weights' errors.
    """
    largest = weight.abs().amax(1, keepdim=True)
    errors = []
    for share in CLIPS:
        off = rounded(weight.clamp(-share * largest, share * largest)) - weight
        errors.append(((off @ gram) * off).sum(1))
    return torch.tensor(CLIPS, dtype=weight.dtype)[torch.stack(errors).argmin(0)]


def _inputs(model: Any, linears: Mapping[str, nn.Linear], tokens: Tensor) -> dict[str, Tensor]:
    """What some linear layers are given, ``[tokens, channels]`` each."""
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, Sequence[Tensor]], None]:
        def hook(module: nn.Module, arguments: Sequence[Tensor]) -> None:
            seen[name] = arguments[0].flatten(0, -2).clone()

        return hook

    handles = [linear.register_forward_pre_hook(record(name)) for name, linear in linears.items()]
    try:
        model(input_ids=tokens)
    finally:
        for handle in handles:
            handle.remove()
    return seen
