"""A torchrun for tests: its processes are forked from one that has imported torch and DeepSpeed already.

Importing DeepSpeed takes seconds per process and a suite of layouts starts hundreds of processes. This program pays
once, then serves requests, one JSON object per line on stdin, one answer per line on stdout::

    {"script": "...py", "arguments": [...], "processes": 4, "logs": "directory", "timeout": 120}
    {"failed": null} or {"failed": 2}

Every rank runs the script as ``__main__`` in a fresh fork with torchrun's environment; its output goes to
``rank0.log``, ``rank1.log``, ... Nothing outlives a request: the first rank that fails takes its peers down and is
named in the answer, and a rank that hangs dumps the stack of all its threads and exits.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

#: Imported before the first fork. DeepSpeed imports the second, and half of torch's compiler with it, when it checks
#: its first optimizer.
PRELOADED = ("megatron_prune.training.setup", "deepspeed.runtime.zero.muon.muon_optimizer", "megatron_prune.pretrain")


def main() -> None:
    """Serve requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import prints is no answer
    import deepspeed

    for name in PRELOADED:
        importlib.import_module(name)
    assert deepspeed.ops.__compatible_ops__  # DeepSpeed runs the compiler to find out, at the first look
    gc.freeze()  # a rank's own collections need not walk, and so copy, everything imported here
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"failed": _serve(request)}), file=answers, flush=True)


def _serve(request: dict[str, Any]) -> int | None:
    """Run one request; returns the rank that failed first, or None."""
    keeper, port = _start_store()
    ranks: dict[int, int] = {}
    for rank in range(request["processes"]):
        child = os.fork()
        if not child:
            _become_rank(rank, port, request)
        ranks[child] = rank
    failed = None
    while ranks:
        child, status = os.wait()
        assert child in ranks, "the store died"
        rank = ranks.pop(child)
        if status and failed is None:
            failed = rank
            for peer in ranks:
                os.kill(peer, signal.SIGKILL)
    os.kill(keeper, signal.SIGKILL)
    os.waitpid(keeper, 0)
    return failed


def _start_store() -> tuple[int, int]:
    """Keep the ranks' store in a process of its own, as torchrun does; returns its id and the port.

    The system chooses the port as the store binds it: a port that was looked up before may be taken meanwhile. And the
    store has a thread, which a process that forks had better not have.
    """
    ours, theirs = os.pipe()
    keeper = os.fork()
    if not keeper:
        try:
            store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(theirs, str(store.port).encode())
            signal.pause()
        finally:
            os._exit(1)
    os.close(theirs)
    port = int(os.read(ours, 16))
    os.close(ours)
    return keeper, port


def _become_rank(rank: int, port: int, request: dict[str, Any]) -> None:
    """Run the script in this process and end it; never returns."""
    code = 1
    try:
        with Path(request["logs"], f"rank{rank}.log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        faulthandler.enable()
        faulthandler.dump_traceback_later(request["timeout"], exit=True)
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["processes"], "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")  # the store is there
        code = _run_script(request["script"], request["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the fork must not unwind into the server's loop


def _run_script(script: str, arguments: Sequence[str]) -> int:
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # the server has to learn of every failure
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
