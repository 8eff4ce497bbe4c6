"""A tiny source model, tokenised data, and ways to start a run as a user would."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layout_runs import Cluster

VOCAB_SIZE = 96
TIMEOUT_SECONDS = 240


@dataclasses.dataclass(frozen=True)
class Workspace:
    """Inputs of the tests' runs.

    Attributes:
        root: directory for runs.
        source: Hugging Face directory of a random tiny Llama.
        data: prefix of its tokens.
        repo: the repository.
        cluster: starts processes that need not import DeepSpeed.
    """

    root: Path
    source: Path
    data: Path
    repo: Path
    cluster: Cluster

    def flags(self, run: str, **changes: Any) -> list[str]:
        """Flags of a short fp32 pruning run with all three types; ``changes`` by flag name, None drops one."""
        values: dict[str, Any] = {
            "source": self.source,
            "data_path": self.data,
            "save": self.root / run,
            "seq_length": 16,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "train_iters": 40,
            "precision": "fp32",
            "lr": 3e-3,
            "lr_warmup_iters": 2,
            "prune_ratio": "4:1",
            "prune_align": 8,
            "target_shape": "hidden=24,ffn=24,heads=2",
            "save_interval": 0,
            "log_interval": 1,
            "eval_interval": 10,
            "eval_iters": 1,
            "split": "80,20,0",
        }
        values.update(changes)
        flags = []
        for name, value in values.items():
            if value is not None:
                flags += [f"--{name.replace('_', '-')}", str(value)]
        return flags

    def command(self, flags: Sequence[str], processes: int = 1) -> list[str]:
        """The command line of a run on one or several processes of this machine."""
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return [*launcher, str(self.repo / "pretrain_prune.py"), *flags]

    def run(
        self, flags: Sequence[str], processes: int = 1, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end, in processes of its own, started as a user would."""
        return subprocess.run(
            self.command(flags, processes),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            env={**os.environ, **(env or {})},
        )

    def run_ok(self, flags: Sequence[str], processes: int = 1) -> str:
        """Run to the end, successfully, in forked processes; returns what the first one printed."""
        logs = Path(tempfile.mkdtemp(prefix="logs-", dir=self.root))
        self.cluster.run(self.repo / "pretrain_prune.py", flags, processes, logs, TIMEOUT_SECONDS)
        return (logs / "rank0.log").read_text()

    def stop_at(self, flags: Sequence[str], step: int, signal_number: int, processes: int = 1) -> int:
        """Start a run, signal its processes once a step is logged, and return the exit code of the launcher."""
        save = Path(flags[flags.index("--save") + 1])
        process = subprocess.Popen(
            self.command(flags, processes), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not any(line["step"] >= step for line in read_lines(save / "metrics.jsonl")):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline, "the run never reached the step"
            time.sleep(0.02)
        process.send_signal(signal_number)
        _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode is not None, errors
        return process.returncode


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, a line that is being written left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def same_run(first: Path, second: Path, tolerance: float) -> None:
    """Assert equal ledgers (index for index) and equal loss curves."""
    ledgers = [read_lines(path / "ledger.jsonl") for path in (first, second)]
    assert [(e["step"], e["type"], e["removed"]) for e in ledgers[0]] == [
        (e["step"], e["type"], e["removed"]) for e in ledgers[1]
    ]
    curves = [read_lines(path / "metrics.jsonl") for path in (first, second)]
    assert [line["step"] for line in curves[0]] == [line["step"] for line in curves[1]]
    for mine, theirs in zip(*curves, strict=True):
        assert mine.keys() == theirs.keys()
        for key in {"loss", "val_loss"} & mine.keys():
            assert mine[key] == pytest.approx(theirs[key], abs=tolerance, rel=tolerance), (key, mine, theirs)
        if "grad_norm" in mine:  # Adam amplifies rounding in gradients more than in losses
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=30 * tolerance, abs=0), (mine, theirs)


@pytest.fixture(scope="session")
def read_jsonl() -> Callable[[Path], list[dict[str, Any]]]:
    """Reader of JSON-lines files."""
    return read_lines


@pytest.fixture(scope="session")
def assert_same_run() -> Callable[[Path, Path, float], None]:
    """Comparison of two run directories."""
    return same_run


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Iterator[Workspace]:
    """Make the source and the data once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_prune.data.indexed import IndexedDatasetWriter

    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(root / "source")
    # A noisy cycle over the vocabulary: something to learn, so that losses move.
    draw = np.random.default_rng(0)
    with IndexedDatasetWriter(str(root / "text"), np.uint16) as writer:
        for _ in range(40):
            steps = draw.choice([1, 2, 5], size=200, p=[0.7, 0.2, 0.1])
            writer.add_document((np.cumsum(steps) + draw.integers(VOCAB_SIZE)) % VOCAB_SIZE)
        writer.finalize()
    cluster = Cluster()
    yield Workspace(root, root / "source", root / "text", repo_root, cluster)
    cluster.close()
