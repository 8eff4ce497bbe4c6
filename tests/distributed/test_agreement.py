"""A decision is rank 0's, and a rank that decided otherwise stops the run."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_prune.errors import MegatronPruneError
from megatron_prune.parallel.collectives import agreed, all_reduce_sum_, from_main, gather, largest
from megatron_prune.parallel.mesh import Mesh, make_mesh


def join(rank: int, port: int) -> Mesh:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    return make_mesh(torch.device("cpu"))


def work(rank: int, port: int, out: str) -> None:
    mesh = join(rank, port)
    vector = torch.tensor([1.0, 10.0]).double() * (rank + 1)
    all_reduce_sum_(vector, mesh)
    assert vector.tolist() == [3.0, 30.0]
    assert largest(rank, mesh) == 1
    assert from_main(f"from {rank}", mesh) == "from 0"
    assert gather(rank * 7, mesh) == [0, 7]
    assert agreed("same", mesh) == "same"
    try:
        agreed(f"prune head {rank}", mesh)
    except MegatronPruneError as error:
        (Path(out) / f"rank{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


def test_two_ranks(tmp_path: Path, port: int) -> None:
    mp.spawn(work, args=(port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        error = (tmp_path / f"rank{rank}").read_text()
        assert "rank 0 chose prune head 0" in error
        assert "rank 1 chose prune head 1" in error
