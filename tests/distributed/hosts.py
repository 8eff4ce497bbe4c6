"""A tiny run on one or two hosts of this machine, started as users start it, with each launcher's own program.

A host is a network, process and host name namespace, joined to the other by a virtual cable. Where namespaces cannot
be made (they need root), a host is a loopback address of its own; :attr:`Hosts.kind` says which.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ports import free_port

from megatron_prune.data.indexed import IndexedDatasetWriter

START_SECONDS = 200  # imports on a busy machine
LAUNCHERS = ("deepspeed", "torchrun", "srun")
#: What a launcher sets, and what must not reach a run from the process that runs the tests.
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class Host:
    """A machine, or what stands in for one.

    Attributes:
        name: its host name.
        address: where the other host reaches it.
        prefix: what runs a command there.
    """

    name: str
    address: str
    prefix: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Two hosts.

    Attributes:
        kind: what they are made of, ``namespaces`` or ``loopback addresses``.
        pair: rank 0's first.
        interface: name of the network interface between them.
        unplug: takes the second one off the network without a word to anybody; None where that cannot be done.
    """

    kind: str
    pair: tuple[Host, Host]
    interface: str
    unplug: tuple[str, ...] | None = None


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts in namespaces where this machine lets us make them, else on two loopback addresses."""
    with contextlib.ExitStack() as stack:
        try:
            hosts = _in_namespaces(stack)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no namespaces ({error}): two loopback addresses instead", file=sys.stderr)
            name = socket.gethostname()
            hosts = Hosts("loopback addresses", (Host(name, "127.0.0.2"), Host(name, "127.0.0.3")), "lo")
        yield hosts


def _in_namespaces(stack: contextlib.ExitStack) -> Hosts:
    hosts = []
    names = [f"prune-{os.getpid()}-{index}" for index in range(2)]
    for index, name in enumerate(names):
        _ip("netns", "add", name)
        stack.callback(_ip, "netns", "del", name)
        hostname = f"host-{index}"
        namespaces = ("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        enter = ("bash", "-c", 'hostname "$0" && exec "$@"', hostname)
        prefix = ("ip", "netns", "exec", name, *namespaces, *enter)
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
        hosts.append(Host(hostname, f"10.83.0.{index + 1}", prefix))
    _ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
    for name, host in zip(names, hosts, strict=True):
        _ip("-n", name, "address", "add", f"{host.address}/24", "dev", "wire")
        for interface in ("lo", "wire"):
            _ip("-n", name, "link", "set", interface, "up")
    unplug = ("ip", "-n", names[1], "address", "flush", "dev", "wire")
    return Hosts("namespaces", (hosts[0], hosts[1]), "wire", unplug)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclasses.dataclass(frozen=True)
class TinyRun:
    """Inputs of runs that prune all three types within seconds, and the commands that start them.

    Attributes:
        root: directory of the inputs and the runs.
        script: pretrain_prune.py.
    """

    root: Path
    script: Path

    @classmethod
    def make(cls, root: Path, repo: Path) -> TinyRun:
        """Write a source without weights (a run draws them from its seed) and a few tokens."""
        (root / "source").mkdir()
        (root / "source" / "config.json").write_text(json.dumps(_MODEL))
        with IndexedDatasetWriter(str(root / "text"), np.uint16) as writer:
            steps = np.random.default_rng(0).choice([1, 2, 5], size=4000)
            writer.add_document(np.cumsum(steps) % _MODEL["vocab_size"])
            writer.finalize()
        return cls(root, repo / "pretrain_prune.py")

    def flags(self, run: str, layout: Sequence[str], iters: int) -> list[str]:
        """Flags of a run in ``root / run``; ``layout`` are those of the model-parallel sizes."""
        values = {
            "source": self.root / "source",
            "data-path": self.root / "text",
            "save": self.root / run,
            "seq-length": 16,
            "micro-batch-size": 1,
            "global-batch-size": 4,
            "train-iters": iters,
            "precision": "fp32",
            "lr": 3e-3,
            "lr-warmup-iters": 2,
            "prune-ratio": "4:1",
            "prune-align": 8,
            "target-shape": "hidden=24,ffn=24,heads=2",
            "log-interval": 1,
            "eval-interval": 0,
            "split": "1,0,0",
        }
        return [*(word for name, value in values.items() for word in (f"--{name}", str(value))), *layout]

    def on_one_host(self, launcher: str, flags: Sequence[str]) -> list[str]:
        """The command that starts two processes here."""
        if launcher == "torchrun":
            return [*_torchrun(), "--standalone", "--nproc-per-node", "2", str(self.script), *flags]
        port = str(free_port())
        return [_program("deepspeed"), "--num_gpus", "2", "--master_port", port, str(self.script), *flags]

    def start_on_two(self, launcher: str, hosts: Hosts, flags: Sequence[str]) -> list[subprocess.Popen[str]]:
        """Start one process on each host, as a user does without ssh: the same command there and there."""
        port = str(free_port())
        hostfile = self.root / "hostfile"
        hostfile.write_text("# two hosts\n" + "".join(f"node-{index} slots=1\n" for index in range(2)))
        started = []
        for index, host in enumerate(hosts.pair):
            variables = {"GLOO_SOCKET_IFNAME": hosts.interface}
            node, address = str(index), hosts.pair[0].address
            if launcher == "deepspeed":
                where = ["--no_ssh", "--node_rank", node, "--master_addr", address, "--master_port", port]
                command = [_program("deepspeed"), "--hostfile", str(hostfile), *where]
            elif launcher == "torchrun":
                where = ["--node-rank", node, "--master-addr", address, "--master-port", port]
                command = [*_torchrun(), "--nnodes", "2", "--nproc-per-node", "1", *where]
            else:  # srun starts the program itself; MASTER_ADDR is the batch script's
                command = [sys.executable]
                variables |= {"SLURM_PROCID": node, "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
                variables |= {"MASTER_ADDR": address, "MASTER_PORT": port}
            started.append(start([*host.prefix, *command, str(self.script), *flags], variables))
        return started


def start(command: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a command whose stdout and stderr are read together at its end, in a process group of its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**inherited, **variables},
        start_new_session=True,
    )


@contextlib.contextmanager
def ended(processes: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    """Whatever happens inside, nothing of these process groups outlives it."""
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def rank_processes(save: Path) -> dict[int, int]:
    """Process ids, by rank, of a run's training processes on this machine, whatever namespace they are in."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is none of ours
            words = (directory / "cmdline").read_bytes().split(b"\0")
            variables = dict(word.partition(b"=")[::2] for word in (directory / "environ").read_bytes().split(b"\0"))
            rank = variables.get(b"RANK", variables.get(b"SLURM_PROCID"))
            if rank is not None and str(save).encode() in words and b"python" in words[0]:
                found[int(rank)] = int(directory.name)
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, a line that is being written left out; none where there is no file yet."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def wait_for(condition: Callable[[], object], processes: Sequence[subprocess.Popen[str]], seconds: float) -> None:
    """Wait for something that the processes will bring about; fails with their output if one ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def _torchrun() -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run"]


def _program(name: str) -> str:
    path = shutil.which(name, path=sysconfig.get_path("scripts"))
    assert path is not None, name
    return path
