"""No change of any file of a checkpoint goes unnoticed, and no manifest or header is believed blindly."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from tiny_checkpoint import alone, pruned, save_alone, save_split, sign, sign_shards

from megatron_prune.checkpoint.files import sha256_file, sha256_of
from megatron_prune.checkpoint.reader import Found
from megatron_prune.checkpoint.store import Checkpoint, DamagedCheckpoint, open_newest
from megatron_prune.errors import UserError

#: Of the newest checkpoint.
NEWEST, BEFORE = "step_00000002", "step_00000001"
#: What opening a checkpoint of a few kilobytes may hold at a time.
MOST_BYTES = 3 << 20  # a checksum reads 1 MiB at a time
#: Each example makes its own copy of the run.
EXAMPLES = settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
FUZZ = settings(EXAMPLES, max_examples=120)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two runs of two steps each: ``alone`` of one process, ``split`` of two ranks."""
    root = tmp_path_factory.mktemp("corruption")
    mesh = alone(root)
    for step in (1, 2):
        save_alone(root / "alone", mesh, step)
        save_split(root / "split", pruned(2), step)
    yield root
    dist.destroy_process_group()


def newest_whole(run_dir: Path) -> Found:
    """What a run resumes, as the ranks find it: manifests and headers first, checksums of the shards afterwards."""
    found = open_newest(run_dir)
    assert found is not None
    while (damage := found.checkpoint.damage(found.checkpoint.shard_names())) is not None:
        error = DamagedCheckpoint(found.checkpoint.path, *damage)
        found = open_newest(run_dir, (*found.damaged, error))
        assert found is not None
    return found


@st.composite
def corruptions(draw: st.DrawFn) -> tuple[str, int, float, bytes]:
    kind = draw(st.sampled_from(["flip", "flip", "flip", "truncate", "delete", "garbage", "append", "swap", "other"]))
    return kind, draw(st.integers(0, 1000)), draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1))


def corrupt(directory: Path, how: tuple[str, int, float, bytes]) -> set[str]:
    """Damage one file, or swap two; returns the names of which one must be reported, none if nothing changed."""
    kind, which, where, junk = how
    files = sorted(path.name for path in directory.iterdir())
    name = files[which % len(files)]
    path = directory / name
    content = bytearray(path.read_bytes())
    position = int(where * len(content))
    if kind in ("swap", "other"):
        other = directory / files[(which // 7) % len(files)] if kind == "swap" else directory.parent / BEFORE / name
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        same = path.read_bytes() == content
        return set() if same else {name, other.name}
    if kind == "delete":
        path.unlink()
        return {name}
    if kind == "flip":
        content[position] ^= 1 << (which % 8)
    elif kind == "truncate":
        del content[position:]
    elif kind == "append":
        content += junk
    else:
        content[position : position + len(junk)] = junk
    same = path.read_bytes() == content
    path.write_bytes(content)
    return set() if same else {name}


@given(st.sampled_from(["alone", "split"]), corruptions())
@EXAMPLES
def test_every_corruption_is_found_named_and_survived(
    saved: Path, tmp_path: Path, run: str, how: tuple[str, int, float, bytes]
) -> None:
    run_dir = tmp_path / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(saved / run, run_dir)
    directory = run_dir / "checkpoints" / NEWEST
    names = corrupt(directory, how)
    if not names:
        Checkpoint(directory)
        return
    with pytest.raises(DamagedCheckpoint) as caught:
        Checkpoint(directory)
    if names == {"COMPLETE"} and how[0] == "other":  # it is whole and of another manifest: either may be wrong
        names = {"manifest.json"}
        assert "COMPLETE" in str(caught.value)
    assert caught.value.file in names
    assert str(directory / caught.value.file) in str(caught.value)
    assert "\n" not in str(caught.value)
    if how[0] == "other":  # the step before got the other file of each pair
        with pytest.raises(UserError, match="is whole"):
            newest_whole(run_dir)
        return
    found = newest_whole(run_dir)
    assert found.checkpoint.path.name == BEFORE
    assert [damage.file for damage in found.damaged] == [caught.value.file]


#: What may stand in a place of a JSON file that someone else wrote.
STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 5, 10**6, 10**7, 10**9, 2**31, 2**63, 10**30, -(10**9), 0.5, 1e308, float("nan")]),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.just([[0] * 3, [1]]),
    st.just([10**9]),
    st.just({"a": 1}),
    st.integers(500, 3000).map(lambda depth: json.loads("[" * (depth // 8) + "]" * (depth // 8))),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed(content: Any, path: tuple[Any, ...], to: Any, delete: bool) -> Any:
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if delete:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return content


def open_watched(directory: Path) -> str | None:
    """Open a checkpoint; the error's line, or None if it was accepted. Nothing else may come of it."""
    tracemalloc.start()
    try:
        Checkpoint(directory)
        error = None
    except UserError as refused:
        error = str(refused)
        assert "\n" not in error
        assert str(directory) in error
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < MOST_BYTES
    return error


@given(st.data(), st.sampled_from(["alone", "split"]), STRANGE, st.booleans())
@FUZZ
def test_manifests_are_not_believed(
    saved: Path, tmp_path: Path, data: st.DataObject, run: str, to: Any, delete: bool
) -> None:
    """A manifest with correct checksums and something strange in it: one line, and nothing allocated on its word."""
    directory = tmp_path / "step"
    if not directory.exists():
        shutil.copytree(saved / run / "checkpoints" / NEWEST, directory)
    content = json.loads((saved / run / "checkpoints" / NEWEST / "manifest.json").read_text())
    part = data.draw(st.sampled_from(["source", "partition", "progress", "shards", *content]))
    path = data.draw(st.sampled_from([(part,), *((part, *inner) for inner in places(content[part]))]))
    strange = changed(content, path, to, delete)
    shutil.rmtree(directory)
    shutil.copytree(saved / run / "checkpoints" / NEWEST, directory)
    sign(directory, strange)
    error = open_watched(directory)
    free = ("settings", "version", "architecture", "data_fingerprint")  # nothing is built from these
    harmless = ("max_position_embeddings", "norm_eps", "sliding_window", "family", "rope", "consumed_samples")
    counters = ("units_spent", "continue_from", "exported", "pace_from", "pace_spent", "step", "adam_steps")
    # Another number than was counted, and a text that whoever takes it up refuses.
    counted = ("deferred_at", "skips_in_a_row", "recent_losses", "rollbacks", "saliency")
    if error is None and strange != content and part not in free:
        assert set(path) & {*harmless, *counters, *counted}, (path, to)


@given(st.data(), STRANGE, st.booleans())
@FUZZ
def test_headers_are_not_believed(saved: Path, tmp_path: Path, data: st.DataObject, to: Any, delete: bool) -> None:
    directory = tmp_path / "step"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(saved / "split" / "checkpoints" / NEWEST, directory)
    shard = directory / "rank_00001.safetensors"
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"]["fragments"] = json.loads(header["__metadata__"]["fragments"])
    path = data.draw(st.sampled_from(list(places(header))))
    strange = changed(header, path, to, delete)
    metadata = strange.get("__metadata__")
    if isinstance(metadata, dict) and "fragments" in metadata and path[-1] != "fragments":
        metadata["fragments"] = json.dumps(metadata["fragments"])
    text = json.dumps(strange).encode()
    claimed = data.draw(st.sampled_from([len(text), len(text), len(text) + 1, 0, 10**8, 2**63]))
    shard.write_bytes(claimed.to_bytes(8, "little") + text + raw[8 + length :])
    sign_shards(directory)
    error = open_watched(directory)
    if error is None:  # of a tensor that another rank keeps, this one may say anything: it stores nothing of it
        assert claimed == len(text)
        before, after = Checkpoint(saved / "split" / "checkpoints" / NEWEST), Checkpoint(directory)
        for spec in before.specs().values():
            assert torch.equal(before.live(spec), after.live(spec)), path
    else:
        assert "rank_00001.safetensors" in error or "manifest.json does not fit its shards" in error


@given(st.binary(max_size=300))
@FUZZ
def test_shards_of_any_bytes(saved: Path, tmp_path: Path, content: bytes) -> None:
    directory = tmp_path / "step"
    if not directory.exists():
        shutil.copytree(saved / "alone" / "checkpoints" / NEWEST, directory)
    (directory / "rank_00000.safetensors").write_bytes(content)
    sign_shards(directory)
    error = open_watched(directory)
    assert error is not None
    assert "rank_00000.safetensors" in error


@pytest.mark.parametrize("line", ["{}", "[]", '{"event": 1}', "\xff", "[" * 10_000, "null", "1e999"])
def test_ledgers_of_any_lines(saved: Path, tmp_path: Path, line: str) -> None:
    directory = tmp_path / "step"
    shutil.copytree(saved / "alone" / "checkpoints" / NEWEST, directory)
    (directory / "ledger.jsonl").write_bytes(line.encode("latin-1"))
    content = json.loads((directory / "manifest.json").read_text())
    content["ledger"] = sha256_file(directory / "ledger.jsonl")
    sign(directory, content)
    with pytest.raises(DamagedCheckpoint, match=r"ledger\.jsonl is no ledger"):
        Checkpoint(directory)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("source", "norm_eps", 10**400),
        ("progress", "recent_losses", [-(10**400)]),
        ("source", "rope", {"theta": 1.0, "kind": "x", "options": [["factor", 10**400]]}),
        ("source", "rope", {"theta": 1.0, "kind": "x", "options": [["factor", json.loads("[" * 600 + "]" * 600)]]}),
        ("settings", "parallel", []),
    ],
)
def test_numbers_beyond_floats_and_deep_values_are_no_manifest(
    saved: Path, tmp_path: Path, part: str, field: str, value: Any
) -> None:
    directory = tmp_path / "step"
    shutil.copytree(saved / "alone" / "checkpoints" / NEWEST, directory)
    content = json.loads((directory / "manifest.json").read_text())
    content[part][field] = value
    sign(directory, content)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is no manifest of ours"):
        Checkpoint(directory)


@pytest.mark.parametrize("name", ["manifest.json", "COMPLETE", "ledger.jsonl"])
def test_files_grown_huge_are_not_read(saved: Path, tmp_path: Path, name: str) -> None:
    directory = tmp_path / "step"
    shutil.copytree(saved / "alone" / "checkpoints" / NEWEST, directory)
    os.truncate(directory / name, 1 << 40)  # a sparse file takes no room
    assert f"{name} has 1,099,511,627,776 bytes" in str(open_watched(directory))


def test_a_checkpoint_under_the_name_of_another_step_is_none(saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / BEFORE
    shutil.copytree(saved / "alone" / "checkpoints" / NEWEST, directory)
    with pytest.raises(DamagedCheckpoint, match="is of step 2"):
        Checkpoint(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"format": 4}', '{"format": "3"}', "\xff", "NaN"])
def test_manifests_of_any_text(saved: Path, tmp_path: Path, text: str) -> None:
    directory = tmp_path / "step"
    shutil.copytree(saved / "alone" / "checkpoints" / NEWEST, directory)
    (directory / "manifest.json").write_bytes(text.encode("latin-1"))
    line = f"{sha256_file(directory / 'manifest.json')}  manifest.json\n"
    (directory / "COMPLETE").write_text(line + f"{sha256_of(line.encode())}  COMPLETE\n")
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is no manifest of ours"):
        Checkpoint(directory)
