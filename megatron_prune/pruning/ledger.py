"""The ledger: one JSON line per removal, in the source model's coordinates.

Source model + ledger reproduce every index set of the pruned model, under any layout and any number of compactions.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_prune.architecture import Architecture
from megatron_prune.errors import UserError
from megatron_prune.parallel.partition import Partition
from megatron_prune.pruning.groups import MiniGroup, remove


@dataclasses.dataclass(frozen=True)
class Event:
    """One ledger line.

    Attributes:
        event: number of the removal, from 1.
        step: optimizer steps taken when it happened.
        tokens: training tokens consumed by then.
        type: ``attention``, ``ffn`` or ``stem``.
        removed: source index per layer, or the one stem index.
        scores: the candidates' scores by type.
        shape: hidden_size, ffn_hidden_size, num_attention_heads after the event.
        parameters: parameters after the event.
    """

    event: int
    step: int
    tokens: int
    type: str
    removed: list[int] | int
    scores: Mapping[str, float]
    shape: Mapping[str, int]
    parameters: int

    @property
    def group(self) -> MiniGroup:
        """The mini-group this event removed."""
        removed = self.removed if isinstance(self.removed, int) else tuple(self.removed)
        return MiniGroup(self.type, removed)  # type: ignore[arg-type]  # checked when the line was read


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


def read_ledger(path: Path) -> list[Event]:
    """Read a ledger file.

    Raises:
        UserError: the file is missing or a line is not an event.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"cannot read the ledger {path}: {error.strerror}; give the ledger.jsonl of a run") from error
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def replay(source: Architecture, events: Iterable[Event]) -> Partition:
    """The placement that a sequence of events leaves of a source model."""
    partition = Partition.of(source)
    for event in events:
        partition = remove(partition, event.group)
    return partition


def _parse(line: str, where: str) -> Event:
    try:
        data: dict[str, Any] = json.loads(line)
        event = Event(**data)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where} is not a ledger line ({error}); restore the file or resume from --load") from error
    if event.type not in ("attention", "ffn", "stem"):
        raise UserError(f"{where} has the unknown type {event.type!r}; expected attention, ffn or stem")
    return event
