"""Where the inputs of the prunable matrices can be seen: one place for each input, which several matrices may share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from torch import nn

from megatron_prune.architecture import Axis
from megatron_prune.model.transformer import DecoderLayer, LMHead


@dataclasses.dataclass(frozen=True)
class InputSite:
    """An input ``[B, S, width]`` that is multiplied by one or more matrices.

    Attributes:
        axis: the logical axis of its last dimension. ``stem`` is whole on every tensor-parallel rank (under sequence
            parallelism for this rank's part of the sequence), ``heads`` and ``ffn`` are this rank's own.
        layer: decoder layer, or None.
        module: the first argument of its forward pass is the input.
        readers: names of the weights ``[out, width]`` that multiply it.
    """

    axis: Axis
    layer: int | None
    module: nn.Module
    readers: tuple[str, ...]


def input_sites(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[InputSite]:
    """The inputs of all matrices but the embedding.

    A tied head is left out: what is done to it would be done to the embedding.

    Args:
        modules: decoder layers, the head and others, each with the prefix of its parameters' names.
    """
    for prefix, module in modules:
        if isinstance(module, DecoderLayer):
            layer, attention, mlp = int(prefix.split(".")[2]), module.self_attn, module.mlp
            projections = tuple(f"{prefix}self_attn.{name}_proj.weight" for name in "qkv")
            yield InputSite("stem", layer, attention, projections)
            yield InputSite("heads", layer, attention.o_proj, (f"{prefix}self_attn.o_proj.weight",))
            yield InputSite("stem", layer, mlp, (f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight"))
            yield InputSite("ffn", layer, mlp.down_proj, (f"{prefix}mlp.down_proj.weight",))
        elif isinstance(module, LMHead):
            yield InputSite("stem", None, module, (f"{prefix}weight",))
