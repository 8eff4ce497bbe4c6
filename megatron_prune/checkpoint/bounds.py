"""Values from a manifest that anyone may have written: types, ranges and sizes, checked before anything is built.

Nothing here allocates more than the file itself has: widths that pruning can shrink are counts of listed slots, and the
few sizes that stand as plain numbers have limits. The reader of the shards then compares the parameters these make with
the elements that are there.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from megatron_prune.architecture import Architecture, Rope
from megatron_prune.checkpoint.files import short, whole_number
from megatron_prune.parallel.partition import DEAD, IntArray, Partition, live

_LARGEST_SIZE = 1 << 24  # of any width, and of the vocabulary
_LARGEST_HEADS = 1 << 22  # all layers together
_LARGEST_COUNT = 1 << 62
_SLOT_FIELDS = ("ffn", "heads", "kv_heads")

_Record = TypeVar("_Record")


def checked_record(cls: type[_Record], data: object, what: str, **given: Any) -> _Record:
    """A flat dataclass of numbers, flags and names from JSON.

    Args:
        cls: a dataclass whose fields are int, float, bool, str, literals, tuples of such, or one of these or None.
        data: the JSON value.
        what: names it in errors.
        given: fields already converted.

    Raises:
        ValueError: no object, a field is missing, unknown or of another type, or a number is out of range.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{what} is {short(data)}, not an object")
    hints = typing.get_type_hints(cls)
    wrong = data.keys() ^ hints.keys()
    if wrong:
        state = "an unknown" if min(wrong) in data else "no"
        raise ValueError(f"{what} has {state} field {short(min(wrong))}")
    values = {name: _checked(data[name], hint, f"{what}.{name}") for name, hint in hints.items() if name not in given}
    return cls(**values, **given)


def read_architecture(data: object) -> Architecture:
    """An architecture from JSON.

    Raises:
        ValueError: something in it is missing, of the wrong type, out of range or contradicts the rest.
    """
    fields = data if isinstance(data, dict) else {}
    rope = fields.get("rope")
    options = rope.get("options") if isinstance(rope, dict) else None
    if not isinstance(options, list) or not all(_is_option(option) for option in options):
        raise ValueError(f"source.rope is {short(rope)}, which has no list of plain options")
    assert isinstance(rope, dict)
    frozen = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in options)
    arch = checked_record(
        Architecture,
        data,
        "source",
        rope=checked_record(Rope, rope, "source.rope", options=frozen),
        kv_groups=_kv_groups(fields),
    )
    for field in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "head_dim", "vocab_size"):
        whole_number(getattr(arch, field), f"source.{field}", least=1, most=_LARGEST_SIZE)
    return arch


def read_partition(source: Architecture, data: object) -> Partition:
    """A placement from JSON.

    Raises:
        ValueError: slots are no such lists, out of the source's range, taken twice, or do not fit one another.
    """
    if not isinstance(data, dict) or data.keys() != {"stem", *_SLOT_FIELDS}:
        raise ValueError(f"partition is {short(data)}, not an object of stem, ffn, heads and kv_heads")
    _slots([data["stem"]], source.hidden_size, "partition.stem")
    limits = {"ffn": source.ffn_hidden_size, "heads": source.num_attention_heads}
    for name in _SLOT_FIELDS:
        layers = data[name]
        if not isinstance(layers, list) or len(layers) != source.num_layers:
            raise ValueError(f"partition.{name} is not a list of {source.num_layers} layers")
        for layer, rows in enumerate(layers):
            limit = limits.get(name, source.num_kv_heads(layer))
            _slots(rows, limit, f"partition.{name} of layer {layer}", copies=name == "kv_heads")
    partition = Partition.from_dict(source, data)
    _check_consistent(partition)
    return partition


def _check_consistent(partition: Partition) -> None:
    ranks = partition.tensor_parallel
    widths = {(array.shape[0], len(live(array))) for array in partition.ffn}
    head_counts = {(array.shape[0], len(live(array))) for array in partition.heads}
    if len(widths) != 1 or len(head_counts) != 1 or next(iter(head_counts))[0] != ranks:
        raise ValueError("partition differs between layers in ranks, FFN channels or heads")
    for layer, (heads, kv_heads) in enumerate(zip(partition.heads, partition.kv_heads, strict=True)):
        kv_of_head = np.asarray(partition.source.kv_of_head(layer))
        if len(kv_heads) != ranks or set(kv_of_head[live(heads)]) != set(live(kv_heads)):
            raise ValueError(f"partition.kv_heads of layer {layer} are not those that its heads read")
        if any(not np.isin(kv_of_head[live(row)], of_rank).all() for row, of_rank in zip(heads, kv_heads, strict=True)):
            raise ValueError(f"partition.kv_heads of layer {layer} are on other ranks than the heads that read them")


def _slots(rows: object, limit: int, what: str, copies: bool = False) -> None:
    """Slots of every rank: source units in ascending order, none twice, DEAD in between."""
    try:
        array: IntArray = np.array(rows)
    except ValueError as error:
        raise ValueError(f"{what} has rows of different length") from error
    if array.dtype.kind != "i" or array.ndim != 2 or not len(live(array)):
        raise ValueError(f"{what} is {short(rows)}, not rows of slots")
    if array.min() < DEAD or array.max() >= limit:
        raise ValueError(f"{what} has a slot that is none of the source's {limit}")
    for row in array:
        if (np.diff(row[row != DEAD]) <= 0).any():
            raise ValueError(f"{what} is not in ascending order")
    if not copies and (np.diff(live(array)) == 0).any():
        raise ValueError(f"{what} has a slot on two ranks")


def _kv_groups(fields: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    groups = fields.get("kv_groups")
    heads, layers = fields.get("num_attention_heads"), fields.get("num_layers")
    whole_number(heads, "source.num_attention_heads", least=1, most=_LARGEST_SIZE)
    whole_number(layers, "source.num_layers", least=1, most=_LARGEST_SIZE)
    assert isinstance(heads, int)
    assert isinstance(layers, int)
    if heads * layers > _LARGEST_HEADS:
        raise ValueError(f"source has {heads} heads in {layers} layers, beyond reason")
    if not isinstance(groups, list) or len(groups) != layers:
        raise ValueError(f"source.kv_groups is not a list of {layers} layers")
    for layer in groups:
        if not isinstance(layer, list) or not all(type(size) is int and size > 0 for size in layer):
            raise ValueError(f"source.kv_groups has {short(layer)}, not a list of group sizes")
        if sum(layer) != heads:
            raise ValueError(f"source.kv_groups has {short(layer)}, which does not add up to {heads} heads")
    return tuple(tuple(layer) for layer in groups)


def _checked(value: object, hint: Any, what: str) -> Any:
    choices: tuple[Any, ...] = (hint,)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        choices = typing.get_args(hint)
    for choice in choices:
        if choice is type(None) and value is None:
            return None
        if choice is int and type(value) is int:
            return whole_number(value, what, most=_LARGEST_COUNT)
        if choice is float and _is_real(value):
            return value
        if choice in (bool, str) and type(value) is choice:
            return value
        if typing.get_origin(choice) is typing.Literal and value in typing.get_args(choice):
            return value
        if typing.get_origin(choice) is tuple and isinstance(value, list):
            return tuple(_checked(item, typing.get_args(choice)[0], f"an entry of {what}") for item in value)
    raise ValueError(f"{what} is {short(value)}, which it cannot be")


def _is_real(value: object) -> bool:
    if type(value) is int:  # one of hundreds of digits is no float
        return abs(value) <= _LARGEST_COUNT
    return type(value) is float and math.isfinite(value)


def _is_option(option: object) -> bool:
    if not isinstance(option, list) or len(option) != 2 or not isinstance(option[0], str):
        return False
    values = option[1] if isinstance(option[1], list) else [option[1]]
    return all(value is None or type(value) in (bool, str) or _is_real(value) for value in values)
