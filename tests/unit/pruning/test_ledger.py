"""The ledger file and its replay."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.pruning.ledger import Event, Ledger, parse_ledger, replay

ARCH = Architecture("llama", 2, 6, 10, 4, uniform_kv_groups(2, 4, 2), 4, 9)


def event(number: int, kind: str, removed: list[int | list[int]] | int) -> Event:
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
    assert parse_ledger((tmp_path / "ledger.jsonl").read_bytes()) == events
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
    assert [entry.removed for entry in parse_ledger((tmp_path / "ledger.jsonl").read_bytes())] == [1, 2, 0]


@pytest.mark.parametrize(
    "line", [b"{", b'{"event": 1}', b"[]", b"null", b"[" * 10_000, b'"\xff"', b'{"event": 1' + 5000 * b"0" + b"}"]
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes) -> None:
    good = json.dumps(dataclasses.asdict(event(1, "stem", 0))).encode()
    with pytest.raises(ValueError, match="line 2" if line.isascii() else "utf-8"):
        parse_ledger(good + b"\n" + line + b"\n")


@pytest.mark.parametrize(
    "wrong",
    [
        {"event": 0},
        {"event": True},
        {"step": -1},
        {"step": "1"},
        {"tokens": 10**30},
        {"type": "layer"},
        {"type": ["stem"]},
        {"type": "ffn"},
        {"removed": -1},
        {"removed": [1, 2]},
        {"type": "ffn", "removed": []},
        {"type": "ffn", "removed": [0, None]},
        {"type": "ffn", "removed": [[0]]},
        {"scores": None},
        {"scores": {"stem": "0.5"}},
        {"scores": {"stem": 10**400}},
        {"shape": [1, 2, 3]},
        {"shape": {"hidden_size": 0.5}},
        {"parameters": None},
        {"more": 1},
    ],
    ids=str,
)
def test_a_line_with_an_impossible_field_is_named(wrong: dict[str, Any]) -> None:
    line = dataclasses.asdict(event(1, "stem", 0))
    assert len(parse_ledger(json.dumps(line).encode())) == 1
    with pytest.raises(ValueError, match=r"^line 1 [^\n]*$"):
        parse_ledger(json.dumps(line | wrong).encode())
