"""What a run does when it doubts what it sees, on two ranks: a bad sample among boring ones, a model that is broken."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layout_runs import HERE, VOCAB_SIZE, Layout, Runs, Source, lines
from safetensors.torch import load_file, save_file

from megatron_prune.data.indexed import IndexedDatasetWriter

SOURCE = Source(heads=6, kv_heads=6, tied=False)
SEQ_LENGTH = 12
SAMPLES = 4 * 48
BAD_SAMPLE = 77  # read after step 10: the loss is low by then, and groups are removed
CHANGES: dict[str, Any] = {
    "split": "1,0,0",
    "eval_interval": 0,
    "train_iters": 40,
    "lr": 1e-2,
    "prune_ratio": "1:1",
    "prune_axes": "ffn",
    "target_shape": "ffn=20",
}


@pytest.fixture(scope="module")
def data(runs: Runs) -> Path:
    """One token over and over, but for one sample of noise."""
    tokens = np.full(SAMPLES * SEQ_LENGTH + 1, 3)
    tokens[BAD_SAMPLE * SEQ_LENGTH :][:SEQ_LENGTH] = np.random.default_rng(0).integers(VOCAB_SIZE, size=SEQ_LENGTH)
    path = runs.root / "boring"
    with IndexedDatasetWriter(str(path), np.uint16) as writer:
        writer.add_document(tokens)
        writer.finalize()
    return path


def run(runs: Runs, name: str, layout: Layout, *words: str) -> tuple[Path, str]:
    directory = runs.root / name
    directory.mkdir()
    flags = runs.flags(SOURCE, layout, directory, **CHANGES) + list(words)
    runs.cluster.run(HERE / "layout_worker.py", flags, layout.processes, directory)
    return directory, (directory / "rank0.log").read_text()


def bad_step(directory: Path) -> int:
    """The step that read the sample of noise."""
    losses = {line["step"]: line["loss"] for line in lines(directory / "metrics.jsonl")}
    step = max(range(10, 40), key=lambda step: losses[step])
    assert losses[step] > 10 * losses[step - 1]
    return step


def test_a_spike_of_saliency_puts_a_removal_off(runs: Runs, data: Path) -> None:
    directory, log = run(runs, "spike", Layout(data=2), f"--data-path={data}", "--saliency-spike=20")
    bad = bad_step(directory)
    assert f"step {bad}/40 | removal put off" in log
    decided = [event["step"] for event in lines(directory / "ledger.jsonl")]
    assert bad - 1 in decided
    assert bad not in decided
    assert decided.count(bad + 1) == 2, "made up for by the next step, which decides whatever it sees"


def test_a_jump_of_the_loss_goes_back_to_the_last_checkpoint(runs: Runs, data: Path) -> None:
    plain, _ = run(runs, "plain", Layout(data=2), f"--data-path={data}")
    words = (f"--data-path={data}", "--rollback-loss-jump=0.1", "--save-interval=10")
    directory, log = run(runs, "jump", Layout(tensor=2), *words)
    bad = bad_step(plain)
    back = (bad - 1) // 10 * 10
    assert f"step {bad}/40 | the loss jumped" in log
    assert f"back to {back}" in log
    before, after = lines(plain / "metrics.jsonl"), lines(directory / "metrics.jsonl")
    assert [line["step"] for line in after] == list(range(1, 41))
    for line, other in zip(after[:back], before[:back], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-2, abs=1e-4), "what came before it stays"
    assert all(line["loss"] < 0.1 for line in after[back:]), "the sample is not read again"
    assert after[back]["tokens"] == before[bad]["tokens"], "the samples seen since are used up"
    events = [event["step"] for event in lines(directory / "ledger.jsonl")]
    assert events == sorted(set(events)), "the removals since are undone"


def test_skips_in_a_row_end_the_run(runs: Runs, data: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(runs.source(SOURCE), tmp_path / "source")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][3] = math.nan
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(AssertionError, match="3 steps in a row had a non-finite gradient, up to step 3;"):
        run(runs, "skips", Layout(data=2), f"--data-path={data}", f"--source={broken}", "--max-skipped-steps=3")
    assert not (runs.root / "skips" / "checkpoints").exists()
