"""Starting again: which checkpoint is taken, and what changed flags mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.checkpoint.store import Checkpoint, newest_checkpoint


def progress(run_dir: Path) -> Any:
    path = newest_checkpoint(run_dir)
    assert path is not None
    return Checkpoint(path).manifest.progress


@pytest.fixture(scope="module")
def ten_steps(workspace: Any) -> Path:
    """A run that ended in the middle of pruning, and whose tokenizer was a file."""
    tokenizer = workspace.root / "words.json"
    tokenizer.write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "model": {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1}, "unk_token": "</s>"},
            }
        )
    )
    run = workspace.flags("origin", prune_ratio="1:1", train_iters=10, eval_interval=0, tokenizer=tokenizer)
    workspace.run_ok(run)
    return Path(workspace.root / "origin")


def test_a_tokenizer_file_travels_with_the_run(ten_steps: Path) -> None:
    assert "WordLevel" in (ten_steps / "source" / "tokenizer.json").read_text()


def test_load_starts_another_run_which_then_resumes_itself(workspace: Any, ten_steps: Path, read_jsonl: Any) -> None:
    flags = workspace.flags("branch", prune_ratio="1:1", train_iters=14, eval_interval=0, load=ten_steps)
    output = workspace.run_ok(flags)
    assert f"resuming {ten_steps}" in output
    longer = workspace.flags("branch", prune_ratio="1:1", train_iters=16, eval_interval=0, load=ten_steps)
    output = workspace.run_ok(longer)
    assert f"resuming {workspace.root / 'branch'}" in output, "a requeued run must not go back to its origin"
    assert progress(ten_steps).step == 10, "the origin is left alone"
    assert [line["step"] for line in read_jsonl(workspace.root / "branch" / "metrics.jsonl")] == list(range(11, 17))


def test_a_changed_pace_owes_nothing_for_the_past(workspace: Any, ten_steps: Path, read_jsonl: Any) -> None:
    flags = workspace.flags("faster", prune_ratio="4:1", train_iters=13, eval_interval=0, load=ten_steps)
    workspace.run_ok(flags)
    units = {"attention": 8, "ffn": 1, "stem": 2}
    for step in (11, 12, 13):
        events = [e for e in read_jsonl(workspace.root / "faster" / "ledger.jsonl") if e["step"] == step]
        assert sum(units[e["type"]] for e in events[:-1]) < 4, "the last one may overdraw, nothing may be made up for"


def test_a_lower_target_opens_a_finished_run_again(workspace: Any) -> None:
    first = workspace.flags("reopened", target_shape="ffn=44", train_iters=8, eval_interval=0)
    workspace.run_ok(first)
    assert progress(workspace.root / "reopened").continue_from is not None
    second = workspace.flags("reopened", target_shape="ffn=40", train_iters=16, eval_interval=0)
    workspace.run_ok(second)
    path = newest_checkpoint(workspace.root / "reopened")
    assert path is not None
    assert Checkpoint(path).manifest.partition.architecture().ffn_hidden_size == 40


def test_load_alone_saves_there(workspace: Any) -> None:
    workspace.run_ok(workspace.flags("alone", train_iters=4, eval_interval=0))
    workspace.run_ok(
        workspace.flags("unused", save=None, load=workspace.root / "alone", train_iters=6, eval_interval=0)
    )
    assert progress(workspace.root / "alone").step == 6
