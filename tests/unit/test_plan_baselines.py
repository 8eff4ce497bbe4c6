"""The plan of a run that prunes all at once, or beside a teacher."""

from __future__ import annotations

from megatron_prune.config import Config, parse_source_shape
from megatron_prune.config.yaml_file import with_values
from megatron_prune.layouts import fit_sentence
from megatron_prune.memory import GIB
from megatron_prune.plan import Plan, format_plan, make_plan

SOURCE = parse_source_shape("hidden=2048,ffn=8192,heads=32,kv_heads=32,head_dim=64,layers=24,vocab=49152,tied=1")
BATCH_TOKENS = 512 * 2048


def config(**values: object) -> Config:
    given = {"target_shape": "hidden=1195,ffn=3006,heads=19", "train_iters": 1000, "micro_batch_size": 8}
    return with_values(Config(), given | values)


def plan(**values: object) -> Plan:
    return make_plan(config(**values), SOURCE)


def test_few_shot_pruning_takes_its_samples_and_no_steps() -> None:
    few = plan(few_shot_samples=128)
    assert few.phases[0].tokens == 0
    assert (few.phases[-1].steps, few.phases[-1].tokens, few.phases[-1].units) == (0, 128 * 2048, 7724)
    assert few.continue_steps == 1000
    assert "all at once before training, as the gradient of 262,144 tokens decides" in format_plan(few)


def test_learned_masks_take_their_steps() -> None:
    sheared = plan(sheared_iters=300)
    assert (sheared.phases[-1].steps, sheared.phases[-1].tokens) == (0, 300 * BATCH_TOKENS)
    assert sheared.continue_steps == 700
    assert "all at once after 300 steps of learning masks" in format_plan(sheared)


def test_a_teacher_is_counted_and_named() -> None:
    alone, taught = plan(), plan(distill_weight=0.5)
    for phase, other in zip(taught.phases, alone.phases, strict=True):
        teacher = 2 * (SOURCE.num_parameters() + 8 * 2048 * SOURCE.hidden_size)  # bf16; the source, whatever the phase
        assert phase.memory(recompute=True).teacher == teacher
        assert phase.memory(recompute=True).total(True) == other.memory(recompute=True).total(True) + teacher
    assert "the teacher 3.3" in format_plan(taught)
    assert "teacher" not in format_plan(alone)
    assert "teacher 3.3" in fit_sentence(config(distill_weight=0.5), SOURCE, 1, 80 * GIB)
