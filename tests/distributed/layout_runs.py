"""Tiny sources, data, layouts, and runs of them on processes that one launcher forks (see launcher.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune.checkpoint.store import Checkpoint, newest_checkpoint
from megatron_prune.data.indexed import IndexedDatasetWriter

HERE = Path(__file__).parent
VOCAB_SIZE = 97  # no multiple of 2 or 3: the vocabulary is padded under tensor parallelism
HEAD_DIM = 8
TIMEOUT_SECONDS = 120  # of one run
LOG_TAIL = 4000  # characters

#: What a layout may change: order of summation, no more.
LOSS_ABS = 1e-5
GRAD_NORM_REL = 1e-5
WEIGHTS_ABS = 1e-4
SCORES_REL = 1e-4


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the processes of a run share the model."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False

    @property
    def processes(self) -> int:
        """World size."""
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        return f"tp{self.tensor}pp{self.pipeline}dp{self.data}" + "sp" * self.sequence_parallel


@dataclasses.dataclass(frozen=True)
class Source:
    """A random Mistral (a Llama in every tensor, but transformers lets its hidden size be no multiple of its heads)."""

    heads: int
    kv_heads: int
    tied: bool = True
    layers: int = 2

    def __str__(self) -> str:
        return f"{self.heads}q{self.kv_heads}kv{self.layers}l" + ("tied" if self.tied else "untied")


class Cluster:
    """Client of launcher.py, which starts with the first run."""

    def __init__(self) -> None:
        self._launcher: subprocess.Popen[str] | None = None

    def run(
        self, script: Path, arguments: Sequence[str], processes: int, logs: Path, timeout: int = TIMEOUT_SECONDS
    ) -> None:
        """Run a script on so many ranks; their output goes to files in ``logs``.

        Raises:
            AssertionError: a rank failed, or dumped its stack after so many seconds; the end of its output follows.
        """
        request = {
            "script": str(script),
            "arguments": list(arguments),
            "processes": processes,
            "logs": str(logs),
            "timeout": timeout,
        }
        try:
            failed = self._ask(request)["failed"]
        except BaseException:  # pytest's own time limit, say: the launcher is in the middle of something
            self.close()
            raise
        if failed is not None:
            log = (logs / f"rank{failed}.log").read_text()[-LOG_TAIL:]
            raise AssertionError(f"rank {failed} of {processes} failed first:\n{log}")

    def close(self) -> None:
        """Kill the launcher and whatever it started."""
        if self._launcher is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._launcher.pid, 9)
            self._launcher.communicate()
            self._launcher = None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._launcher is None:
            command = [sys.executable, str(HERE / "launcher.py")]
            pipe = subprocess.PIPE
            self._launcher = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
        assert self._launcher.stdin is not None
        assert self._launcher.stdout is not None
        print(json.dumps(request), file=self._launcher.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._launcher.stdout.readline())
        return answer


class Runs:
    """Runs of sources on layouts, each made once and kept for every test that asks.

    The numbers are chosen for comparability. An initializer_range of 0.3 spreads saliencies, so that no choice is a
    near tie. Adam's first steps divide a gradient by its own size and so amplify its rounding: the learning rate is
    small and eps well above that rounding. Clipping and weight decay are active. At 16 units a step the budget is met
    after 6 or 7 of 14 steps and as many compactions, and training goes on.

    The seed is one of which the problem is well conditioned, as single-process runs tell: with every source weight
    changed by 1.2e-7 of itself, decisions stay and losses, gradient norms and weights move by less than half of what
    the comparisons below allow.
    """

    def __init__(self, root: Path, cluster: Cluster) -> None:
        self.root = root
        self.cluster = cluster
        self._finished: dict[str, Path | str] = {}

    def source(self, source: Source) -> Path:
        """Hugging Face directory of a source."""
        from transformers import MistralConfig, MistralForCausalLM

        path = self.root / f"source-{source}"
        if not path.exists():
            torch.manual_seed(7)
            config = MistralConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=40,
                intermediate_size=64,
                num_hidden_layers=source.layers,
                num_attention_heads=source.heads,
                num_key_value_heads=source.kv_heads,
                head_dim=HEAD_DIM,
                sliding_window=None,
                max_position_embeddings=64,
                tie_word_embeddings=source.tied,
                initializer_range=0.3,
            )
            MistralForCausalLM(config).save_pretrained(path)
        return path

    def data(self) -> Path:
        """Prefix of tokens: a noisy cycle over the vocabulary, something to learn."""
        path = self.root / "text"
        if not path.with_suffix(".idx").exists():
            draw = np.random.default_rng(0)
            with IndexedDatasetWriter(str(path), np.uint16) as writer:
                for _ in range(40):
                    steps = draw.choice([1, 2, 5], size=200, p=[0.7, 0.2, 0.1])
                    writer.add_document((np.cumsum(steps) + draw.integers(VOCAB_SIZE)) % VOCAB_SIZE)
                writer.finalize()
        return path

    def flags(self, source: Source, layout: Layout, save: Path, **changes: Any) -> list[str]:
        """Flags of a run; ``changes`` by flag name: None drops one, True is a switch."""
        values: dict[str, Any] = {
            "source": self.source(source),
            "data_path": self.data(),
            "save": save,
            "split": "80,20,0",
            "seq_length": 12,
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "train_iters": 14,
            "precision": "fp32",
            "lr": 1e-3,
            "lr_warmup_iters": 2,
            "adam_eps": 1e-5,
            "clip_grad": 2.0,
            "prune_start_iter": 0,
            "prune_ratio": "16:1",
            "prune_align": 8,
            "target_shape": "hidden=24,ffn=20,heads=3",
            "save_interval": 0,
            "log_interval": 1,
            "eval_interval": 7,
            "eval_iters": 1,
            "tensor_model_parallel_size": layout.tensor,
            "pipeline_model_parallel_size": layout.pipeline,
        }
        values.update(changes)
        words = []
        for name, value in values.items():
            if value is not None:
                words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return words + ["--sequence-parallel"] * layout.sequence_parallel

    def get(self, source: Source, layout: Layout, **changes: Any) -> Path:
        """Run directory of a finished run.

        Raises:
            AssertionError: a rank failed, now or when the run was made.
        """
        name = "-".join([str(source), str(layout), *(str(value).replace("=", "") for value in changes.values())])
        if name not in self._finished:
            directory = self.root / name
            directory.mkdir()
            flags = self.flags(source, layout, directory, **changes)
            try:
                self.cluster.run(HERE / "layout_worker.py", flags, layout.processes, directory)
            except AssertionError as error:
                self._finished[name] = str(error)
            else:
                self._finished[name] = directory
        result = self._finished[name]
        if isinstance(result, str):
            raise AssertionError(result)
        return result


def lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def witnessed(run: Path) -> list[dict[str, Any]]:
    """What layout_worker.py saw on every rank, in rank order."""
    ranks = range(len(list(run.glob("rank*.npz"))))
    return [dict(np.load(run / f"rank{rank}.npz")) for rank in ranks]


def exported_weights(run: Path) -> dict[str, torch.Tensor]:
    """The fp32 tensors an export of a run's last checkpoint holds, by Hugging Face name."""
    path = newest_checkpoint(run)
    assert path is not None, f"{run} has no checkpoint"
    checkpoint = Checkpoint(path)
    return {name: checkpoint.live(spec, "master") for name, spec in checkpoint.specs().items()}


def assert_same_decisions(run: Path, baseline: Path) -> None:
    """Equal ledgers but for the rounding of the scores."""
    ours, theirs = lines(run / "ledger.jsonl"), lines(baseline / "ledger.jsonl")
    for mine, other in zip(ours, theirs, strict=False):  # the first that differs says more than a different length
        scores = mine.pop("scores"), other.pop("scores")
        assert mine == other, f"after scores {scores}"
        assert scores[0] == pytest.approx(scores[1], rel=SCORES_REL)
    assert len(ours) == len(theirs)


def assert_same_curves(run: Path, baseline: Path, slack: float = 1) -> None:
    """Losses, validation losses and gradient norms agree at every step, to ``slack`` times the usual."""
    ours, theirs = lines(run / "metrics.jsonl"), lines(baseline / "metrics.jsonl")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for key, rel, absolute in (("loss", 0, LOSS_ABS), ("val_loss", 0, LOSS_ABS), ("grad_norm", GRAD_NORM_REL, 0)):
            assert (key in mine) == (key in other)
            if key in mine:
                expected = pytest.approx(other[key], rel=slack * rel, abs=slack * absolute)
                assert mine[key] == expected, f"{key} of step {mine['step']}"


def assert_same_weights(run: Path, baseline: Path, slack: float = 1) -> None:
    """Every exported tensor agrees to ``slack`` times 1e-4."""
    ours, theirs = exported_weights(run), exported_weights(baseline)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        assert (tensor - theirs[name]).abs().max() <= slack * WEIGHTS_ABS, name
