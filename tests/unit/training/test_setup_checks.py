"""A checkpoint that a run cannot go on from, found without a process group."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prune.checkpoint.manifest import Progress
from megatron_prune.config import BaselineConfig, Config
from megatron_prune.config.yaml_file import with_values
from megatron_prune.errors import UserError
from megatron_prune.pruning.ledger import Event
from megatron_prune.pruning.replay import Replay
from megatron_prune.training.setup import _check_begun, check_start

FEW_SHOT = Config(baseline=BaselineConfig(few_shot_samples=8))
SHEARED = Config(baseline=BaselineConfig(sheared_iters=6))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (FEW_SHOT, "--few-shot-samples 8 cannot go on from the checkpoint of step 4: it prunes before the first step"),
        (SHEARED, "--sheared-iters 6 cannot go on from the checkpoint of step 4: it was trained without masks"),
    ],
)
def test_a_run_that_has_begun_is_not_pruned_at_once(config: Config, words: str) -> None:
    with pytest.raises(UserError, match=words):
        _check_begun(config, Progress(step=4))


@pytest.mark.parametrize("progress", [Progress(), Progress(step=4, continue_from=0)], ids=["new", "pruned"])
def test_before_the_first_step_and_after_pruning_it_goes_on(progress: Progress) -> None:
    for config in (FEW_SHOT, SHEARED, Config()):
        _check_begun(config, progress)


def test_masks_go_on() -> None:
    _check_begun(SHEARED, Progress(step=4, saliency="masks:4:"))


@pytest.mark.parametrize("memory", ["masks:4:3:stem=30:AAAA", "masks", "masks:x:3:ffn=132:AAAA", "1:AAAA"])
def test_masks_of_another_target_are_refused_before_the_run_begins(
    tmp_path: Path, hold_states: Any, memory: str
) -> None:
    manifest = hold_states().manifest
    manifest = dataclasses.replace(manifest, progress=dataclasses.replace(manifest.progress, saliency=memory))
    manifest.settings["baseline"]["sheared_iters"] = 20
    config = with_values(Config(), {"save": str(tmp_path), "sheared_iters": 20, "target_shape": "ffn=30"})
    checkpoint = SimpleNamespace(path=tmp_path / "checkpoints" / "step_00000008", manifest=manifest)
    inputs: Any = SimpleNamespace(source=manifest.partition.source, replay=None, checkpoint=checkpoint)
    with pytest.raises(UserError, match="--sheared-iters (20 )?cannot go on from"):
        check_start(config, inputs)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"target_params": "9K", "few_shot_samples": 8}, "--few-shot-samples 8 cannot go on from the checkpoint"),
        ({"target_shape": "ffn=30", "sheared_iters": 6}, "--sheared-iters 6 cannot go on from the checkpoint"),
        ({"target_latency_ms": 1.0, "few_shot_samples": 8}, "--few-shot-samples 8 cannot go on from the checkpoint"),
        ({"target_params": "9K", "gqa_mode": "balanced"}, "--gqa-mode balanced: the checkpoint has K/V heads"),
        ({"replay": "ledger.jsonl"}, "--replay: the checkpoint has lost other groups"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(
    tmp_path: Path, hold_states: Any, values: dict[str, Any], words: str
) -> None:
    manifest = hold_states().manifest
    source, checkpoint = manifest.partition.source, tmp_path / "run" / "checkpoints" / "step_00000008"
    events = tuple(Event(number, 1, 1, "stem", 3 + number, {}, {}, 1) for number in (1, 2))  # channel 2 has gone
    replay = Replay(source, events) if "replay" in values else None
    config = with_values(Config(), {"save": str(tmp_path / "run"), "prune_align": 8} | values)
    inputs: Any = SimpleNamespace(
        source=source, replay=replay, checkpoint=SimpleNamespace(path=checkpoint, manifest=manifest)
    )
    with pytest.raises(UserError, match=words):
        check_start(config, inputs)
    inputs.replay = None
    check_start(with_values(Config(), {"save": str(tmp_path / "run"), "target_params": "9K"}), inputs)
    check_start(config, SimpleNamespace(checkpoint=None))  # type: ignore[arg-type]
