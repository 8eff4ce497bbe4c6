"""A checkpoint that a baseline cannot go on from."""

from __future__ import annotations

import pytest

from megatron_prune.checkpoint.manifest import Progress
from megatron_prune.config import BaselineConfig, Config
from megatron_prune.errors import UserError
from megatron_prune.training.setup import _check_begun

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
