"""A decision is rank 0's, and a rank that decided otherwise stops the run."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_prune.errors import MegatronPruneError
from megatron_prune.parallel.collectives import agreed, all_reduce_sum_, from_main, gather, largest
from megatron_prune.parallel.mesh import Mesh, make_mesh


def join(rank: int, directory: str) -> Mesh:
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    return make_mesh(torch.device("cpu"))


def work(rank: int, directory: str) -> None:
    mesh = join(rank, directory)
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
        (Path(directory) / f"rank{rank}").write_text(str(error))
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        error = (tmp_path / f"rank{rank}").read_text()
        assert "rank 0 chose prune head 0" in error
        assert "rank 1 chose prune head 1" in error
