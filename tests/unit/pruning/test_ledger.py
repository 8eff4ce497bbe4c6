"""The ledger file and its replay."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.errors import UserError
from megatron_prune.pruning.ledger import Event, Ledger, read_ledger, replay

ARCH = Architecture("llama", 2, 6, 10, 4, uniform_kv_groups(2, 4, 2), 4, 9)


def event(number: int, kind: str, removed: list[int] | int) -> Event:
    return Event(number, number, 10 * number, kind, removed, {"ffn": 0.1}, {"hidden_size": 6}, 100 - number)


def test_events_survive_the_file_and_replay(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    events = [
        event(1, "ffn", [3, 4]),
        event(2, "stem", 5),
        event(3, "attention", [0, 3]),
        event(4, "attention", [1, 0]),
    ]
    for entry in events:
        ledger.append(entry)
    assert read_ledger(tmp_path / "ledger.jsonl") == events
    arch = replay(ARCH, events).architecture()
    assert (arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads) == (5, 9, 2)
    assert arch.kv_groups == ((2,), (1, 1)), "layer 0 lost both queries of its first KV head"


def test_restoring_drops_the_future(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for number in (1, 2, 3):
        ledger.append(event(number, "stem", number))
    again = Ledger(tmp_path / "ledger.jsonl")
    again.restore(ledger.events[:2])
    again.append(event(3, "stem", 0))
    assert [entry.removed for entry in read_ledger(tmp_path / "ledger.jsonl")] == [1, 2, 0]


@pytest.mark.parametrize("line", ["{", '{"event": 1}', "[]"])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match="ledger.jsonl:1"):
        read_ledger(path)


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    Ledger(tmp_path / "l").append(event(1, "layer", 0))
    with pytest.raises(UserError, match="unknown type 'layer'"):
        read_ledger(tmp_path / "l")


def test_a_missing_ledger_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the ledger"):
        read_ledger(tmp_path / "none")
