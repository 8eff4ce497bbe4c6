"""Shapes to train from random weights beside a pruned model of the same size, as model directories without weights.

The paper compares with the source at a smaller hidden size, with the source scaled down in all widths, and with the
shape that pruning found. A directory that holds a ``config.json`` and no weights is a ``--source`` like any other.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.checkpoint.hf_config import hf_config_from_architecture
from megatron_prune.config.schema import GqaMode
from megatron_prune.config.targets import reachable_heads, shape_between
from megatron_prune.errors import UserError


def baseline_shapes(
    source: Architecture, budget: int, searched: tuple[int, int, int] | None, gqa_mode: GqaMode = "cluster"
) -> dict[str, Architecture]:
    """The shapes of direct pretraining by name.

    Args:
        source: what pruning starts from.
        budget: parameters; the first two shapes are the largest at or under it.
        searched: hidden, ffn and heads that pruning found, if they are known.
        gqa_mode: how pruning takes heads; under ``balanced`` all shapes have heads that it passes through.

    Returns:
        ``hidden_only``, ``uniform`` and, where it is known, ``searched``.

    Raises:
        UserError: the budget is below the smallest shape.
    """
    shapes = {
        "hidden_only": _largest(source, budget, lambda hidden: dataclasses.replace(source, hidden_size=hidden)),
        "uniform": _largest(source, budget, lambda hidden: _scaled(source, hidden, gqa_mode)),
    }
    if searched is not None:
        shapes["searched"] = _stock(source, *searched, gqa_mode)
    return shapes


def write_config(directory: Path, arch: Architecture, source_config: Mapping[str, Any]) -> None:
    """Write ``config.json`` of a shape.

    Args:
        directory: made if it is missing.
        arch: the shape.
        source_config: the source's ``config.json``, for token ids and the like; or nothing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = hf_config_from_architecture(arch, torch_dtype="bfloat16", extra=source_config)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _largest(source: Architecture, budget: int, shape: Callable[[int], Architecture]) -> Architecture:
    """The widest of shapes that grow with the hidden size whose parameters are within the budget."""
    sizes = range(1, source.hidden_size + 1)
    fitting = bisect.bisect_right(sizes, budget, key=lambda hidden: shape(hidden).num_parameters())
    if not fitting:
        raise UserError(f"no baseline has {budget:,} parameters or fewer: raise --target-params")
    return shape(sizes[fitting - 1])


def _scaled(source: Architecture, hidden: int, gqa_mode: GqaMode) -> Architecture:
    """All widths in the proportion of the hidden size, heads in whole K/V groups or a number that balanced passes."""
    scale = hidden / source.hidden_size
    ffn = max(1, round(scale * source.ffn_hidden_size))
    if gqa_mode == "balanced":
        wanted = scale * source.num_attention_heads
        heads = min(reachable_heads(source, gqa_mode), key=lambda count: abs(count - wanted))
        return shape_between(source, hidden, ffn, heads, gqa_mode)
    groups = max(1, round(scale * source.num_query_groups))
    heads = groups * (source.num_attention_heads // source.num_query_groups)
    return dataclasses.replace(
        source,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        kv_groups=uniform_kv_groups(source.num_layers, heads, groups),
    )


def _stock(source: Architecture, hidden: int, ffn: int, heads: int, gqa_mode: GqaMode) -> Architecture:
    """A pruned shape with as many K/V heads in every layer as divide its heads and come nearest to what pruning leaves.

    Under ``cluster`` pruning leaves layers with K/V heads of different number, which no ``config.json`` can say.
    """
    pruned = shape_between(source, hidden, ffn, heads, gqa_mode)
    if gqa_mode == "balanced":
        return pruned
    left = sum(pruned.num_kv_heads(layer) for layer in range(source.num_layers)) / source.num_layers
    groups = min((n for n in range(1, heads + 1) if heads % n == 0), key=lambda n: abs(n - left))
    return dataclasses.replace(pruned, kv_groups=uniform_kv_groups(source.num_layers, heads, groups))
