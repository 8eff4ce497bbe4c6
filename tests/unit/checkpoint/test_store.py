"""Checkpoint directories: what counts as complete, what is refused, and that dead padding is not stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_prune.architecture import Architecture, tensor_specs, uniform_kv_groups
from megatron_prune.checkpoint.manifest import Manifest, Progress
from megatron_prune.checkpoint.store import Checkpoint, complete_checkpoints, newest_checkpoint, save_checkpoint
from megatron_prune.errors import UserError
from megatron_prune.parallel.mesh import Mesh, make_mesh
from megatron_prune.parallel.partition import Partition
from megatron_prune.parallel.placement import extract, place
from megatron_prune.parallel.states import STATE_KINDS, StateFragment
from megatron_prune.pruning.groups import MiniGroup, remove
from megatron_prune.pruning.ledger import Event

ARCH = Architecture("llama", 2, 6, 10, 4, uniform_kv_groups(2, 4, 2), 4, 9)
EVENT = Event(1, 1, 10, "stem", 2, {"stem": 0.5}, {"hidden_size": 5}, 100)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield make_mesh(torch.device("cpu"))
    dist.destroy_process_group()


def states(partition: Partition) -> dict[tuple[str, str], torch.Tensor]:
    arch = partition.architecture()
    generator = torch.Generator().manual_seed(0)
    return {
        (spec.name, kind): place(torch.randn(arch.tensor_shape(spec), generator=generator), spec, partition)
        for spec in tensor_specs(arch)
        for kind in STATE_KINDS
    }


def save(run_dir: Path, mesh: Mesh, step: int) -> tuple[Path, dict[tuple[str, str], torch.Tensor]]:
    partition = remove(Partition.of(ARCH), MiniGroup("stem", 2))
    tensors = states(partition)
    specs = {spec.name: spec for spec in tensor_specs(ARCH)}
    fragments = [
        StateFragment(specs[name], kind, 0, tensor.flatten())  # type: ignore[arg-type]
        for (name, kind), tensor in tensors.items()
    ]
    manifest = Manifest(partition, Progress(step=step, exported=("1K",)), {"lr": 1.0}, "data", {})
    return save_checkpoint(run_dir, manifest, [EVENT], fragments, mesh, keep_last=2), tensors


def test_what_is_saved_is_what_is_read(tmp_path: Path, mesh: Mesh) -> None:
    path, tensors = save(tmp_path, mesh, 3)
    checkpoint = Checkpoint(path)
    specs, partition = checkpoint.specs(), checkpoint.manifest.partition
    for (name, kind), tensor in tensors.items():
        logical = extract(tensor, specs[name], partition)
        assert torch.equal(checkpoint.live(specs[name], kind), logical)  # type: ignore[arg-type]
    assert checkpoint.manifest.progress == Progress(step=3, exported=("1K",))
    assert checkpoint.events == [EVENT]
    stored = load_file(path / "rank_00000.safetensors")
    live = checkpoint.manifest.partition.architecture().num_parameters()
    assert sum(tensor.numel() for tensor in stored.values()) == 3 * live, "dead padding is not stored"


def test_incomplete_directories_are_not_checkpoints(tmp_path: Path, mesh: Mesh) -> None:
    assert newest_checkpoint(tmp_path) is None
    path, _ = save(tmp_path, mesh, 3)
    later, _ = save(tmp_path, mesh, 12)
    (later / "COMPLETE").unlink()
    (tmp_path / "checkpoints" / "step_x").mkdir()
    assert newest_checkpoint(tmp_path) == path


def test_leftovers_go_and_the_last_two_stay(tmp_path: Path, mesh: Mesh) -> None:
    (tmp_path / "checkpoints" / ".writing_step_00000001").mkdir(parents=True)
    for step in (1, 2, 100_000_000):
        save(tmp_path, mesh, step)
    names = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["step_00000002", "step_100000000"]
    assert [p.name for p in complete_checkpoints(tmp_path)] == names


def test_saving_the_same_step_again_replaces_it(tmp_path: Path, mesh: Mesh) -> None:
    first, _ = save(tmp_path, mesh, 5)
    second, _ = save(tmp_path, mesh, 5)
    assert first == second
    Checkpoint(second)


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "manifest.json", "ledger.jsonl"])
def test_missing_files_are_named(tmp_path: Path, mesh: Mesh, name: str) -> None:
    path, _ = save(tmp_path, mesh, 1)
    (path / name).unlink()
    with pytest.raises(UserError, match=name):
        Checkpoint(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1}'])
def test_unreadable_manifests_are_named(tmp_path: Path, mesh: Mesh, text: str) -> None:
    path, _ = save(tmp_path, mesh, 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        Checkpoint(path)
