"""DeepSpeed's universal format: our way there and back, the slices DeepSpeed will make of it, and hostile files.

That DeepSpeed's own loader takes it is tested in tests/distributed/test_universal_loads.py.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.checkpoint import universal as universal_module
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.checkpoint.reshard import reshard, state_bytes
from megatron_prune.checkpoint.universal import UniversalCheckpoint, engine_name, write_universal
from megatron_prune.errors import UserError
from megatron_prune.parallel.fragments import Layout
from megatron_prune.parallel.placement import place

HoldStates = Callable[..., Any]
MASTERS = "zero/1.mlp.up_proj.weight/fp32.pt"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tensor", [1, 2, 3])
def test_there_and_back_is_bit_for_bit(tmp_path: Path, hold_states: HoldStates, tensor: int, tied: bool) -> None:
    saved, reports = hold_states(tied=tied), list[int]()
    assert saved.manifest.partition.architecture().num_attention_heads == 5, "no multiple of 2 or 3"
    path = write_universal(saved, tmp_path / "universal", tensor, 4, reports.append)
    assert path.name == f"step_{saved.manifest.progress.step:08d}"
    assert (sum(reports) == state_bytes(saved)) is (tensor == 1), "padded for several ranks, plain for one"
    back = Checkpoint(reshard(UniversalCheckpoint(tmp_path / "universal"), tmp_path / "run", Layout(2, 3), 1))
    assert back.manifest.progress == saved.manifest.progress
    assert back.events == saved.events
    for spec in saved.specs().values():
        for kind in saved.kinds():
            assert torch.equal(back.live(spec, kind), saved.live(spec, kind)), (kind, spec.name)


@pytest.mark.parametrize("tensor", [1, 2, 3])
def test_equal_slices_are_the_ranks_tensors(tmp_path: Path, hold_states: HoldStates, tensor: int) -> None:
    saved = hold_states()
    path = write_universal(saved, tmp_path, tensor, 4)
    partition = saved.manifest.partition.spread(tensor, 4 if tensor > 1 else 1)
    for spec in saved.specs().values():
        file = path / "zero" / engine_name(spec, partition.source) / "fp32.pt"
        stored = torch.load(file, weights_only=True)
        for rank in range(tensor):
            physical = place(saved.live(spec), spec, partition, rank)
            # DeepSpeed takes an equal shape for a copy and chunks everything else.
            same = stored["param"].shape == physical.shape
            slice_ = stored["param"] if same else stored["param"].chunk(tensor, stored["cat_dim"])[rank]
            assert torch.equal(slice_, physical), spec.name
        assert stored.get("vocab_tensor", False) is ("embed" in spec.name)


def test_counters_are_deepspeeds(tmp_path: Path, hold_states: HoldStates) -> None:
    saved = hold_states()
    path = write_universal(saved, tmp_path)
    assert (tmp_path / "latest_universal").read_text() == path.name
    state = torch.load(path / "mp_rank_00_model_states.pt", weights_only=True)
    assert (state["global_steps"], state["global_samples"], state["skipped_steps"]) == (8, 32, 1)
    steps = [torch.load(file, weights_only=True).item() for file in path.glob("zero/*/step.pt")]
    assert steps == [7.0] * len(saved.specs())


def test_without_moments_there_are_only_masters(tmp_path: Path, hold_states: HoldStates) -> None:
    path = write_universal(hold_states(adam_steps=0), tmp_path)
    assert {file.name for file in path.glob("zero/*/*")} == {"fp32.pt"}
    assert UniversalCheckpoint(path).kinds() == ("master",)


def test_what_deepspeed_trained_further_takes_the_rest_from_a_checkpoint(
    tmp_path: Path, hold_states: HoldStates
) -> None:
    saved = hold_states()
    path = write_universal(saved, tmp_path)
    for name in ("manifest.json", "COMPLETE", "ledger.jsonl"):
        (path / name).unlink()
    for file in path.glob("zero/*/step.pt"):
        torch.save(torch.tensor(10.0), file)
    with pytest.raises(UserError, match="COMPLETE"):
        UniversalCheckpoint(path)
    found = UniversalCheckpoint(path, saved)
    expected = dataclasses.replace(saved.manifest.progress, step=11, adam_steps=10)
    assert found.manifest.progress == expected, "three steps more, the data where they were"
    assert found.events == saved.events
    spec = saved.specs()["model.norm.weight"]
    assert torch.equal(found.live(spec), saved.live(spec))


def test_nothing_is_overwritten(tmp_path: Path, hold_states: HoldStates) -> None:
    write_universal(hold_states(), tmp_path)
    with pytest.raises(UserError, match="exists"):
        write_universal(hold_states(), tmp_path)


def test_an_interrupted_attempt_has_no_name_and_the_next_one_clears_it(
    tmp_path: Path, hold_states: HoldStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(universal_module, "_write_own_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_universal(hold_states(), tmp_path)
    assert not list(tmp_path.glob("step_*"))
    assert not (tmp_path / "latest_universal").exists()
    write_universal(hold_states(), tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest_universal", "step_00000008"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, hold_states: HoldStates, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(universal_module, "_write_own_files", full)
    with pytest.raises(UserError, match="No space left"):
        write_universal(hold_states(layers=1), tmp_path)
    assert list(tmp_path.iterdir()) == []


class Bomb:
    """Pickled, it makes a directory when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_pickled_code_does_not_run(tmp_path: Path, hold_states: HoldStates) -> None:
    path = write_universal(hold_states(), tmp_path)
    mark = tmp_path / "ran"
    torch.save({"param": Bomb(mark)}, path / MASTERS)
    spec = hold_states().specs()["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(UserError, match="plain tensors"):
        UniversalCheckpoint(path).live(spec)
    assert not mark.exists()


def _compress(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, b"\0" * len(content) if "/data/" in name else content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-40]), "plain tensors"),
        (lambda file: file.write_bytes(b""), "plain tensors"),
        (lambda file: file.write_bytes(b"\x80\x02]q\x00."), "plain tensors"),
        (_compress, "compressed"),
        (lambda file: torch.save([1], file), "no entry 'param'"),
        (lambda file: torch.save({"param": torch.zeros(42, 28)}, file), r"\[42, 28\], not the model's fp32 \[42, 29\]"),
        (lambda file: torch.save({"param": torch.zeros(42, 29).half()}, file), "float16"),
        (lambda file: torch.save({"param": torch.zeros(1).expand(2**40, 29)}, file), "not the model's"),
        (lambda file: torch.save({"param": torch.zeros(42, 29, device="meta")}, file), "meta tensor"),
        (lambda file: torch.save({"param": torch.zeros(42, 29).to_sparse()}, file), "sparse"),
        (lambda file: _flip(file), "wrong checksum"),
        (lambda file: _link(file), "reached by a link"),
        (lambda file: _link(file.parent), "reached by a link"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, hold_states: HoldStates, damage: Callable[[Path], object], message: str
) -> None:
    path = write_universal(hold_states(layers=1), tmp_path)
    damage(path / MASTERS)
    spec = hold_states().specs()["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=message) as caught:
        UniversalCheckpoint(path).live(spec)
    assert MASTERS in str(caught.value)
    assert "\n" not in str(caught.value)


def _flip(file: Path) -> None:
    """One bit of an element."""
    content = bytearray(file.read_bytes())
    element = next(iter(torch.load(file)["param"].flatten())).numpy().tobytes()
    content[content.index(element)] ^= 1
    file.write_bytes(content)


def _link(place: Path) -> None:
    """To where it really is."""
    outside = place.parents[3] / "outside"
    place.rename(outside)
    place.symlink_to(outside)


def test_a_parameter_is_its_tensor(tmp_path: Path, hold_states: HoldStates) -> None:
    saved = hold_states(layers=1)
    path = write_universal(saved, tmp_path / "universal")
    for spec in saved.specs().values():
        file = path / "zero" / engine_name(spec, saved.manifest.partition.source) / "fp32.pt"
        torch.save({"param": torch.nn.Parameter(torch.load(file)["param"])}, file)
    back = Checkpoint(reshard(UniversalCheckpoint(path), tmp_path / "run", Layout(), 1))
    for spec in saved.specs().values():
        assert torch.equal(back.live(spec), saved.live(spec))


@pytest.mark.parametrize("content", [b"", b"\xff\n", None], ids=["empty", "no text", "a line less"])
def test_a_changed_ledger_is_found(tmp_path: Path, hold_states: HoldStates, content: bytes | None) -> None:
    path = write_universal(hold_states(layers=1), tmp_path)
    file = path / "ledger.jsonl"
    file.write_bytes(file.read_bytes().split(b"\n", 1)[1] if content is None else content)
    with pytest.raises(UserError, match=r"ledger\.jsonl is damaged"):
        UniversalCheckpoint(path)


@pytest.mark.parametrize(
    "steps",
    [torch.tensor([1.0, 2.0]), torch.tensor(float("nan")), torch.ones((), device="meta"), -1, 1.5, "7", None],
)
def test_bad_step_counts_are_named(tmp_path: Path, hold_states: HoldStates, steps: object) -> None:
    path = write_universal(hold_states(layers=1), tmp_path)
    torch.save(steps, path / "zero/tied_modules.embed_tokens.weight/step.pt")
    with pytest.raises(UserError, match=r"step\.pt"):
        UniversalCheckpoint(path)


@pytest.mark.parametrize("tag", ["../elsewhere", "/etc", "absent", "", ".", ".."])
def test_the_tag_stays_inside(tmp_path: Path, hold_states: HoldStates, tag: str) -> None:
    home = tmp_path / "home"
    path = write_universal(hold_states(layers=1), home)
    shutil.copytree(path, tmp_path / "elsewhere")
    (home / "latest_universal").write_text(tag)
    with pytest.raises(UserError, match="latest_universal"):
        UniversalCheckpoint(home)


@pytest.mark.parametrize("tag", ["step_00000008", ".."])
def test_a_tag_that_leads_outside_is_refused(tmp_path: Path, hold_states: HoldStates, tag: str) -> None:
    path = write_universal(hold_states(layers=1), tmp_path / "outside")
    home = tmp_path / "outside" / "home"
    home.mkdir()
    (path / "zero").rename(tmp_path / "outside" / "zero")
    (tmp_path / "outside" / "zero").rename(tmp_path / "outside" / ("zero" if tag == ".." else f"{tag}/zero"))
    (home / "step_00000008").symlink_to(path)
    (home / "latest_universal").write_text(tag)
    with pytest.raises(UserError, match="no directory with zero/ beside it"):
        UniversalCheckpoint(home)


def _huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize("make", [os.mkfifo, _huge])
def test_a_tag_file_that_cannot_be_one_is_not_read(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "latest_universal")
    with pytest.raises(UserError, match="latest_universal (is no regular|has 1,099)"):
        UniversalCheckpoint(tmp_path)


def test_a_directory_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no DeepSpeed universal checkpoint"):
        UniversalCheckpoint(tmp_path)
