"""Learning masks step by step, on an engine that only keeps what it is told."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.model.masks import ModelMasks, UnitMask
from megatron_prune.parallel.mesh import Mesh
from megatron_prune.parallel.partition import Partition
from megatron_prune.pruning.masks import MaskLearner
from megatron_prune.training.engine import PruningEngine
from megatron_prune.training.sheared import Shears

SOURCE = Architecture("llama", 2, 12, 20, 4, uniform_kv_groups(2, 4, 4), 4, 31)
STEPS = 3
CPU = torch.device("cpu")


class Engine:
    """Holds masks and a placement."""

    def __init__(self) -> None:
        self.partition = Partition.of(SOURCE)
        self.masks = ModelMasks()

    def set_masks(self, masks: ModelMasks) -> None:
        """Keep them."""
        self.masks = masks

    def remove(self, after: Partition) -> None:
        """Keep it."""
        self.partition = after

    def units(self) -> list[UnitMask]:
        """Every mask that is installed."""
        masks = self.masks
        assert masks.heads is not None
        assert masks.ffn is not None
        assert masks.stem is not None
        return [*masks.heads, *masks.ffn, masks.stem]

    def backward(self, gradient: float) -> None:
        """As a loss would that each mask raises by so much."""
        torch.stack([gradient * unit.drawn.sum() for unit in self.units()]).sum().backward()


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def learner() -> MaskLearner:
    return MaskLearner(SOURCE, {"attention": 3, "ffn": 13, "stem": 7}, 0.1, STEPS, 1, CPU)


@pytest.fixture
def shears(engine: Engine, learner: MaskLearner) -> Shears:
    alone = cast(Mesh, _Alone())
    return Shears(cast(PruningEngine, engine), alone, learner, STEPS)


class _Alone:
    """What is asked of the groups of a single process."""

    stage_group = None
    dp_size = 1
    device = CPU


def logits(learner: MaskLearner) -> Tensor:
    return torch.cat([axis.logits.detach().flatten() for axis in learner.axes.values()])


def step(engine: Engine, shears: Shears, number: int, gradient: float = 0.1) -> int:
    engine.backward(gradient)
    shears.decide(number, 0, lambda decision: True)
    return shears.chosen


def test_the_last_step_cuts_to_the_target_and_leaves_no_mask(engine: Engine, shears: Shears) -> None:
    assert [step(engine, shears, number) for number in range(STEPS)] == [0, 0, 1 + 7 + 5]
    assert not shears.met
    removed = [decision.group.type for decision in shears.commit()]
    assert len(removed) == 13
    arch = engine.partition.architecture()
    assert (arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads) == (7, 13, 3)
    assert engine.masks == ModelMasks()
    assert shears.met
    assert shears.chosen == 0


def test_the_last_step_runs_the_model_that_is_cut(engine: Engine, shears: Shears) -> None:
    for number in range(STEPS - 1):
        step(engine, shears, number)
    units = engine.units()
    masks = [(unit.drawn.detach().clone(), unit.settled.clone()) for unit in units]
    step(engine, shears, STEPS - 1)
    list(shears.commit())
    partition = engine.partition
    kept = [*partition.heads, *partition.ffn, partition.stem]
    for (drawn, settled), indices in zip(masks, kept, strict=True):
        assert drawn.nonzero().flatten().tolist() == sorted(int(unit) for unit in indices.flat if unit >= 0)
        assert torch.equal(drawn, settled)
        assert set(drawn.tolist()) == {0.0, 1.0}


def test_a_memory_is_gone_on_from(engine: Engine, shears: Shears) -> None:
    step(engine, shears, 0)
    memory, drawn = shears.memory, [unit.drawn.detach().clone() for unit in engine.units()]
    step(engine, shears, 1)
    shears.remember(memory)
    assert all(torch.equal(unit.drawn, mask) for unit, mask in zip(engine.units(), drawn, strict=True))
    assert shears.memory == memory


def test_a_skipped_last_step_is_made_up_for(engine: Engine, shears: Shears) -> None:
    for number in range(STEPS):
        step(engine, shears, number)
    shears.discard()
    assert list(shears.commit()) == []
    assert step(engine, shears, STEPS) == 13


def test_masks_are_drawn_anew_for_every_step(engine: Engine, shears: Shears) -> None:
    seen: list[Any] = []
    for number in range(2):
        seen.append(torch.cat([unit.drawn.detach() for unit in engine.units()]).clone())
        step(engine, shears, number)
    assert not torch.equal(*seen)
    assert all(unit.drawn.grad is None for unit in engine.units())


def test_what_raises_the_loss_closes(engine: Engine, shears: Shears, learner: MaskLearner) -> None:
    before = logits(learner)
    step(engine, shears, 0, gradient=5.0)
    assert (logits(learner) - before).max() <= 0
    assert (logits(learner) - before).min() < -0.05


def test_a_gradient_that_is_not_finite_teaches_nothing(engine: Engine, shears: Shears, learner: MaskLearner) -> None:
    before, masks = logits(learner), engine.units()[0].drawn.detach().clone()
    assert step(engine, shears, STEPS, gradient=float("nan")) == 0
    assert torch.equal(logits(learner), before)
    assert not torch.equal(engine.units()[0].drawn.detach(), masks), "those of that step"
    assert step(engine, shears, STEPS) == 13
    assert logits(learner).isfinite().all()
