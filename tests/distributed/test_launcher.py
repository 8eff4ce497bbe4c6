"""The launcher of the other tests reports what goes wrong, and goes on after it."""

from __future__ import annotations

from pathlib import Path

import pytest
from layout_runs import Cluster

JOIN = """
import os, sys, time
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
"""


def write(directory: Path, body: str) -> Path:
    script = directory / "script.py"
    script.write_text(JOIN + body)
    return script


def test_a_failing_rank_is_named_and_takes_its_peers_down(cluster: Cluster, tmp_path: Path) -> None:
    script = write(tmp_path, "assert dist.get_rank() != 1, 'it is me'\ndist.barrier()\n")
    with pytest.raises(AssertionError, match="(?s)rank 1 of 3 failed.*line 6.*it is me"):
        cluster.run(script, [], 3, tmp_path)


def test_a_hanging_job_ends_with_a_stack(cluster: Cluster, tmp_path: Path) -> None:
    script = write(tmp_path, "if dist.get_rank():\n    time.sleep(1000)\ndist.barrier()\n")
    with pytest.raises(AssertionError, match="(?s)Timeout.*script.py"):
        cluster.run(script, [], 2, tmp_path, timeout=2)


def test_exit_codes_count_and_arguments_arrive(cluster: Cluster, tmp_path: Path) -> None:
    script = write(tmp_path, "print(sys.argv[1])\nsys.exit(int(sys.argv[1]) if dist.get_rank() == 0 else 0)\n")
    cluster.run(script, ["0"], 2, tmp_path)
    assert (tmp_path / "rank1.log").read_text() == "0\n"
    with pytest.raises(AssertionError, match="rank 0 of 2"):
        cluster.run(script, ["7"], 2, tmp_path)
