"""The ledger: one JSON line per removal, in the source model's coordinates.

Source model + ledger reproduce every index set of the pruned model, under any layout and any number of compactions.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from megatron_prune.architecture import Architecture
from megatron_prune.parallel.partition import Partition
from megatron_prune.pruning.groups import GroupType, MiniGroup, remove

_LARGEST_COUNT: Final = 1 << 62  # of steps, tokens and parameters


@dataclasses.dataclass(frozen=True)
class Event:
    """One ledger line.

    Attributes:
        event: number of the removal, from 1.
        step: optimizer steps taken when it happened.
        tokens: training tokens consumed by then.
        type: ``attention``, ``ffn`` or ``stem``.
        removed: source index per layer, a list of them per layer where several heads went at once (``--gqa-mode
            balanced``), or the one stem index.
        scores: the candidates' scores by type.
        shape: hidden_size, ffn_hidden_size, num_attention_heads after the event.
        parameters: parameters after the event.
    """

    event: int
    step: int
    tokens: int
    type: str
    removed: list[int | list[int]] | int
    scores: Mapping[str, float]
    shape: Mapping[str, int]
    parameters: int

    @property
    def group(self) -> MiniGroup:
        """The mini-group this event removed."""
        kind: GroupType = self.type  # type: ignore[assignment]  # checked when the line was read
        if isinstance(self.removed, int):
            return MiniGroup(kind, self.removed)
        return MiniGroup(kind, tuple(tuple(index) if isinstance(index, list) else index for index in self.removed))


def shape_of(arch: Architecture) -> dict[str, int]:
    """The three widths a ledger or metrics line carries."""
    return {
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
    }


class Ledger:
    """Append-only file of events.

    Args:
        path: ``ledger.jsonl`` of the run, or None to keep the events in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.events: list[Event] = []

    def append(self, event: Event) -> None:
        """Record an event and flush it."""
        self.events.append(event)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(event)) + "\n")

    def restore(self, events: list[Event]) -> None:
        """Start from the events of a checkpoint; later lines in the file belong to a future that is run again."""
        self.events = list(events)
        if self._path is not None:
            temporary = self._path.with_suffix(".tmp")
            with temporary.open("w") as file:
                file.writelines(json.dumps(dataclasses.asdict(event)) + "\n" for event in events)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)


def parse_ledger(content: bytes) -> list[Event]:
    """The events of a ledger file that anyone may have written.

    Args:
        content: of the file.

    Raises:
        ValueError: it is no UTF-8, or a line is not an event; the line is named.
    """
    lines = content.decode("utf-8").split("\n")
    return [_parse(line, number) for number, line in enumerate(lines, 1) if line.strip()]


def replay(source: Architecture, events: Iterable[Event]) -> Partition:
    """The placement that a sequence of events leaves of a source model."""
    partition = Partition.of(source)
    for event in events:
        partition = remove(partition, event.group)
    return partition


def _parse(line: str, number: int) -> Event:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} is no JSON: {error}") from error
    if not isinstance(data, dict) or data.keys() != _CHECKS.keys():
        raise ValueError(f"line {number} is no object of {', '.join(_CHECKS)}")
    for name, is_right in _CHECKS.items():
        if not is_right(data[name]):
            raise ValueError(f"line {number} has an impossible {name}")
    removed, kind = data["removed"], data["type"]
    sets = not isinstance(removed, int) and any(isinstance(layer, list) for layer in removed)
    if isinstance(removed, int) is not (kind == "stem") or (sets and kind != "attention"):
        raise ValueError(
            f"line {number} removes no {kind}: a stem has one index, all else one per layer, or for attention several"
        )
    return Event(**data)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_COUNT


def _is_score(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) <= _LARGEST_COUNT)


def _is_removed(value: object) -> bool:
    """One index; or for every layer one, or several where heads go by the set."""
    return _is_count(value) or (isinstance(value, list) and bool(value) and all(map(_is_layer, value)))


def _is_layer(value: object) -> bool:
    return _is_count(value) or (isinstance(value, list) and bool(value) and all(map(_is_count, value)))


#: What may stand in the fields of a line.
_CHECKS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "event": lambda value: _is_count(value) and value > 0,
    "step": _is_count,
    "tokens": _is_count,
    "type": lambda value: value in ("attention", "ffn", "stem"),
    "removed": _is_removed,
    "scores": lambda value: isinstance(value, dict) and all(map(_is_score, value.values())),
    "shape": lambda value: isinstance(value, dict) and all(map(_is_count, value.values())),
    "parameters": _is_count,
}
