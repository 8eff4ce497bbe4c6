"""One rank of two that does nothing but watch: ``watch_worker.py RANK ADDRESS DIRECTORY SILENCE``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch.distributed as dist

from megatron_prune.parallel.watch import PeerWatch

if __name__ == "__main__":
    rank, address, directory, silence = sys.argv[1:]
    store = dist.FileStore(str(Path(directory) / "store"), 2)
    with PeerWatch(int(rank), 2, store, address, silence=float(silence)):
        (Path(directory) / f"watching{rank}").touch()
        time.sleep(600)
