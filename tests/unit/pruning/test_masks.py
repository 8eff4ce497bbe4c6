"""Learned masks: their distribution against its definition, their constraints, and what is cut in the end."""

from __future__ import annotations

import base64
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.parallel.partition import Partition
from megatron_prune.pruning.groups import GroupType
from megatron_prune.pruning.masks import LEARN, MaskLearner, draw, open_probability, penalty, settled
from megatron_prune.pruning.planner import width

SOURCE = Architecture("llama", 2, 24, 40, 6, uniform_kv_groups(2, 6, 6), 8, 97)
TARGET: dict[GroupType, int] = {"attention": 3, "ffn": 15, "stem": 18}
CPU = torch.device("cpu")
STEPS = 300


def _learner(steps: int = STEPS, target: dict[GroupType, int] | None = None) -> MaskLearner:
    return MaskLearner(SOURCE, target or TARGET, 0.1, steps, 5, CPU)


def _learned(gains: dict[GroupType, Tensor]) -> MaskLearner:
    """Masks of a loss that falls by a gain for each open mask."""
    learner = _learner()
    for step in range(STEPS):
        masks = learner.masks(step)
        learner.learn(step, masks, {kind: -gains[kind] for kind in masks})
    return learner


@pytest.fixture(scope="module")
def gains() -> dict[GroupType, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        kind: torch.rand(axis.logits.shape, generator=generator) / axis.logits.shape[1]
        for kind, axis in _learner().axes.items()
    }


@pytest.fixture(scope="module")
def learned(gains: dict[GroupType, Tensor]) -> MaskLearner:
    return _learned(gains)


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
def test_draws_are_a_stretched_and_cut_concrete_variable(logit: float) -> None:
    uniform = np.random.default_rng(0).uniform(size=20_000)
    concrete = 1 / (1 + np.exp(-(np.log(uniform / (1 - uniform)) + logit) / (2 / 3)))
    expected = np.clip(1.2 * concrete - 0.1, 0, 1)
    logits = torch.full((20_000,), logit, dtype=torch.float64)
    drawn = draw(logits, torch.from_numpy(uniform))
    np.testing.assert_allclose(drawn.numpy(), expected, rtol=1e-9, atol=1e-9)
    share = float((drawn > 0).double().mean())
    assert float(open_probability(logits[0])) == pytest.approx(share, abs=0.015)
    assert float(settled(logits[0])) == pytest.approx(min(1, max(0, 1.2 / (1 + math.exp(-logit)) - 0.1)))


def test_the_penalty_is_the_lagrangian() -> None:
    excess, linear, quadratic = torch.tensor([0.5, -0.2]), torch.tensor([2.0, 3.0]), torch.tensor([4.0, 5.0])
    assert float(penalty(excess, linear, quadratic)) == pytest.approx(2 * 0.5 + 4 * 0.25 - 3 * 0.2 + 5 * 0.04)


def test_constraints_move_from_the_source_to_the_target() -> None:
    axis = _learner().axes["ffn"]
    share = float(open_probability(axis.logits)[0, 0].detach())
    for progress, target in ((0.0, 1.0), (0.5, 1 - 0.5 * 25 / 40), (1.0, 15 / 40), (7.0, 15 / 40)):
        np.testing.assert_allclose(axis.excess(progress).detach(), [share - target] * 2, rtol=1e-5)


def test_they_settle_at_the_target(learned: MaskLearner) -> None:
    for kind, axis in learned.axes.items():
        assert axis.excess(1.0).detach().abs().max() < 0.15, kind
    masks = torch.cat([mask.flatten() for mask in learned.settled(0).values()])
    assert ((masks < 0.05) | (masks > 0.95)).float().mean() > 0.85


def test_then_they_are_led_to_0_and_1(learned: MaskLearner) -> None:
    """The units that go close one after another; the last step has the masks of the model that is cut."""
    before = {kind: axis.logits.detach().clone() for kind, axis in learned.axes.items()}
    closed = []
    for step in range(int(LEARN * STEPS), STEPS + 2):
        masks = learned.masks(step)
        learned.learn(step, masks, {kind: torch.ones_like(mask) for kind, mask in masks.items()})
        assert all(torch.equal(masks[kind], settled) for kind, settled in learned.settled(step).items())
        closed.append([int((masks[kind] == 0).sum(dim=1).min()) for kind in TARGET])
    assert all(later >= earlier for a, b in pairwise(closed) for earlier, later in zip(a, b, strict=True))
    assert max(b - a for a, b in pairwise(count for _, count, _ in closed)) <= 1, "25 channels in 60 steps"
    for step in (STEPS - 1, STEPS, STEPS + 1):
        for kind, mask in learned.masks(step).items():
            assert torch.equal(mask, learned.axes[kind].kept().float())
    assert any((mask > 0).float().mean() > 0.5 for mask in learned.masks(STEPS - 2).values()), "not all at once"
    assert all(torch.equal(axis.logits, before[kind]) for kind, axis in learned.axes.items()), "no more learning"


def test_what_was_learned_is_taken_up(gains: dict[GroupType, Tensor]) -> None:
    def learn(learner: MaskLearner, first: int, last: int) -> MaskLearner:
        for step in range(first, last):
            masks = learner.masks(step)
            learner.learn(step, masks, {kind: -gains[kind] for kind in masks})
        return learner

    whole, again = learn(_learner(), 0, 40), _learner()
    again.restore(learn(_learner(), 0, 20).state())
    learn(again, 20, 40)
    for kind, axis in whole.axes.items():
        other = again.axes[kind]
        assert torch.equal(axis.logits, other.logits)
        assert torch.equal(axis.linear, other.linear)
        assert torch.equal(axis.quadratic, other.quadratic)


def test_masks_of_another_target_are_refused() -> None:
    with pytest.raises(ValueError, match="its masks are of attention=12,ffn=80,stem=24, and now ffn=80 shrink"):
        _learner(target={"attention": 6, "ffn": 15, "stem": 24}).restore(_learner().state())


def test_what_is_no_state_is_refused() -> None:
    steps, units, packed = _learner().state().split(":")
    infinite = base64.b64encode(np.full(len(base64.b64decode(packed)) // 4, np.inf, "<f4").tobytes()).decode()
    for text in (
        "",
        "x",
        "::",
        f"-1:{units}:{packed}",
        f"1:{units}:{packed[:-8]}",
        f"1:{units}:{infinite}",
        f"1:{units}:é",
    ):
        with pytest.raises(ValueError, match="masks|character|ASCII|padding|buffer"):
            _learner().restore(text)


def test_what_gains_most_is_kept(learned: MaskLearner, gains: dict[GroupType, Tensor]) -> None:
    for kind, axis in learned.axes.items():
        kept = axis.kept()
        assert (kept.sum(dim=1) == TARGET[kind]).all()
        assert gains[kind][kept].mean() > gains[kind][~kept].mean(), kind


def test_removals_lead_to_exactly_the_target(learned: MaskLearner) -> None:
    partition = Partition.of(SOURCE)
    removals = learned.removals(partition)
    arch = removals[-1][2].architecture()
    assert {kind: width(kind, arch) for kind in TARGET} == TARGET
    for kind, axis in learned.axes.items():
        gone = [group for group, _, _ in removals if group.type == kind]
        for layer, kept in enumerate(axis.kept()):
            units = [index for group in gone for index in group.indices(layer)]
            assert sorted(units) == (~kept).nonzero().flatten().tolist()
            assert axis.logits[layer, units].diff().min() >= 0, "the smallest mask goes first"


def test_equal_masks_go_by_index() -> None:
    removals = _learner().removals(Partition.of(SOURCE))
    assert {group.indices(0)[0] for group, _, _ in removals if group.type == "stem"} == set(range(18, 24))


def test_an_axis_that_keeps_its_width_has_no_masks() -> None:
    learner = _learner(target={"attention": 6, "ffn": 15, "stem": 24})
    assert learner.masks(0).keys() == {"ffn"}


def test_masks_are_a_function_of_seed_and_step() -> None:
    first, second = _learner(), _learner()
    for kind, masks in first.masks(3).items():
        assert torch.equal(masks, second.masks(3)[kind])
        assert not torch.equal(masks, second.masks(4)[kind])
