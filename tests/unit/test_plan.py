"""The estimate against the paper's numbers, brute force and hand arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prune.architecture import Architecture
from megatron_prune.config import Config, TargetShape, parse_shape, parse_source_shape, shape_between
from megatron_prune.config.yaml_file import with_values
from megatron_prune.plan import (
    Plan,
    format_plan,
    make_plan,
    plan_dict,
    pruning_steps,
)
from megatron_prune.stops import shape_at_budget, units_between, units_range

SMOLLM_1700M = "hidden=2048,ffn=8192,heads=32,kv_heads=32,head_dim=64,layers=24,vocab=49152,tied=1"
SMOLLM_360M = "hidden=960,ffn=2560,heads=15,kv_heads=5,head_dim=64,layers=32,vocab=49152,tied=1"
QWEN_7B = "hidden=3584,ffn=18944,heads=28,kv_heads=4,head_dim=128,layers=28,vocab=152064,qkv_bias=1"
TINY = "hidden=6,ffn=7,heads=4,kv_heads=2,head_dim=2,layers=2,vocab=11,tied=1"
LLM_PRUNER = "hidden=1169,ffn=3082,heads=19"

#: The rows of the paper (Tables 8-10, section 5) whose tokens and shapes are both known.
RUNS = [
    (SMOLLM_1700M, "hidden=2048,ffn=4870,heads=24", "1:9", 2**20, 500, 3834, 36.71),
    (SMOLLM_1700M, "hidden=1195,ffn=3006,heads=19", "1:9", 2**20, 500, 7724, 73.42),
    (SMOLLM_360M, "hidden=757,ffn=966,heads=5", "1:9", 2**21, 250, 2640, 50.35),
    (SMOLLM_360M, "hidden=757,ffn=966,heads=5", "1:9", 2**21, 500, 2640, 50.88),
    (SMOLLM_1700M, LLM_PRUNER, "1:1", 2**20, 500, 7700, 8.60),
    (SMOLLM_1700M, LLM_PRUNER, "2:1", 2**20, 500, 7700, 4.56),
    (SMOLLM_1700M, LLM_PRUNER, "4:1", 2**20, 500, 7700, 2.54),
]


def _plan(source: str, tokens_per_second: float | None = None, num_gpus: int = 1, **values: object) -> Plan:
    arch = parse_source_shape(source)
    config = with_values(Config(), values)
    return make_plan(config, arch, num_gpus=num_gpus, tokens_per_second=tokens_per_second)


@pytest.mark.parametrize(("source", "target", "ratio", "batch", "warmup", "units", "billions"), RUNS)
def test_tokens_of_the_papers_runs(
    source: str, target: str, ratio: str, batch: int, warmup: int, units: int, billions: float
) -> None:
    config = with_values(Config(), {"target_shape": target, "prune_ratio": ratio, "lr_warmup_iters": warmup})
    found = plan_dict(make_plan(config, parse_source_shape(source), batch_tokens=batch))
    assert found["units"] == units
    assert round(found["tokens"] / 1e9, 2) == billions
    assert found["tokens"] == (found["warmup_steps"] + found["steps"]) * batch
    assert found["units_range"] == [units, units]
    assert found["certain"] is ("kv_heads=5" not in source)


def test_kv_heads_that_may_go_make_the_parameters_a_range() -> None:
    plan = _plan(SMOLLM_360M, target_shape="hidden=757,ffn=966,heads=5")
    low, high = plan_dict(plan)["parameters_range"]
    per_kv_head = 2 * 757 * 64 * 32
    assert (high - low) == (5 - 2) * per_kv_head
    assert low < plan.phases[-1].arch.num_parameters() < high
    assert f"~ target: {low:,} to {high:,} parameters" in format_plan(plan)
    heads_stay = plan_dict(_plan(SMOLLM_360M, target_shape="hidden=757,ffn=966"))
    assert heads_stay["parameters_range"] == [heads_stay["parameters_target"]] * 2
    assert heads_stay["certain"]
    assert plan_dict(_plan(SMOLLM_360M, target_shape="ffn=966,heads=5", gqa_mode="balanced"))["certain"]


@pytest.mark.parametrize(
    ("source", "target", "millions"),
    [
        (SMOLLM_1700M, "hidden=2048,ffn=8192,heads=32", 1711.4),
        (SMOLLM_1700M, "hidden=1195,ffn=3006,heads=19", 456.9),  # EfficientLLM-457M
        (SMOLLM_360M, "hidden=960,ffn=2560,heads=15", 361.8),
        (SMOLLM_360M, "hidden=757,ffn=966,heads=5", 134.4),  # EfficientLLM-134M, KV heads as expected
    ],
)
def test_parameters_of_the_papers_models(source: str, target: str, millions: float) -> None:
    arch = parse_source_shape(source)
    shape = shape_between(arch, *parse_shape(target).resolve(arch))
    assert round(shape.num_parameters() / 1e6, 1) == millions


def test_units() -> None:
    arch = parse_source_shape(TINY)
    assert units_between(arch, TargetShape()) == 0
    assert units_between(arch, TargetShape(hidden_size=5)) == 2
    assert units_between(arch, TargetShape(ffn_hidden_size=6)) == 1
    assert units_between(arch, TargetShape(num_attention_heads=3)) == arch.head_dim


def test_steps_round_up() -> None:
    assert pruning_steps(10, (4, 1)) == 3
    assert pruning_steps(10, (1, 9)) == 90
    assert pruning_steps(0, (1, 9)) == 0


def _without_a_head(arch: Architecture) -> Iterator[Architecture]:
    """Every model that is left when each layer gives any one of its query heads."""
    choices = [
        {tuple(sorted(size - (place == gone) for place, size in enumerate(groups))) for gone in range(len(groups))}
        for groups in arch.kv_groups
    ]
    for groups in itertools.product(*choices):
        kept = tuple(tuple(size for size in layer if size) for layer in groups)
        yield dataclasses.replace(arch, num_attention_heads=arch.num_attention_heads - 1, kv_groups=kept)


def _reachable(arch: Architecture, floor: tuple[int, int, int], budget: int) -> set[int]:
    """Units of every shape at which some order of removals first meets a budget, by walking all of them."""
    seen, found, stack = {arch}, set(), [arch]
    while stack:
        now = stack.pop()
        hidden, ffn, heads = now.hidden_size, now.ffn_hidden_size, now.num_attention_heads
        if now.num_parameters() <= budget:
            found.add(units_between(arch, TargetShape(hidden, ffn, heads)))
            continue
        children = [dataclasses.replace(now, hidden_size=hidden - 1)] if hidden > floor[0] else []
        children += [dataclasses.replace(now, ffn_hidden_size=ffn - 1)] if ffn > floor[1] else []
        children += _without_a_head(now) if heads > floor[2] else []
        stack += [child for child in children if child not in seen]
        seen.update(children)
    return found


@pytest.mark.parametrize("source", [TINY, TINY.replace("kv_heads=2", "kv_heads=4"), TINY + ",qkv_bias=1"])
@pytest.mark.parametrize("share", [0.95, 0.8, 0.5, 0.3])
@pytest.mark.parametrize("floor", [(1, 1, 1), (3, 2, 2)])
def test_range_against_every_way_down(source: str, share: float, floor: tuple[int, int, int]) -> None:
    arch = parse_source_shape(source)
    budget = int(arch.num_parameters() * share)
    budget = max(budget, shape_between(arch, *floor, kv_heads="most").num_parameters())
    reachable = _reachable(arch, floor, budget)
    fewest, most = units_range(arch, floor, budget)
    assert fewest == min(reachable)
    assert most == max(reachable)


def test_searched_shape_is_a_range_around_the_papers() -> None:
    target = _plan(SMOLLM_1700M, target_params="457M").phases[-1]
    assert target.units_range[0] < 7724 < target.units_range[1]
    assert target.units_range[0] <= target.units <= target.units_range[1]


def test_stand_in_is_the_first_at_or_under_the_budget() -> None:
    arch = parse_source_shape(SMOLLM_1700M)
    shape = shape_at_budget(arch, (64, 64, 1), 457_000_000)
    assert 0.99 * 457e6 < shape.num_parameters() <= 457e6
    assert shape_at_budget(arch, (64, 64, 1), arch.num_parameters()) == arch


def test_phases_go_down() -> None:
    plan = _plan(SMOLLM_1700M, target_params="457M", export_at=("800M", "target", "1.1B"))
    assert [phase.name for phase in plan.phases] == ["source", "1.1B", "800M", "target"]
    for before, after in zip(plan.phases, plan.phases[1:], strict=False):
        assert before.arch.num_parameters() > after.arch.num_parameters()
        assert before.tokens < after.tokens
        assert before.memory(recompute=False).total(False) > after.memory(recompute=False).total(False)


def test_gpu_hours_and_continuing() -> None:
    plan = _plan(
        SMOLLM_1700M,
        tokens_per_second=1000.0,
        num_gpus=8,
        target_shape="hidden=1195,ffn=3006,heads=19",
        train_iters=70_016 + 100,
    )
    found = plan_dict(plan)
    assert found["gpu_hours"] == pytest.approx(found["tokens"] / 1000 / 3600)
    assert found["continue_steps"] == 100
    assert found["continue_tokens"] == 100 * 2**20
    assert "continued pretraining: 100 steps" in format_plan(plan)


def test_too_short_a_run_is_noted() -> None:
    short = _plan(SMOLLM_1700M, target_shape="hidden=1195,ffn=3006,heads=19", train_iters=600)
    assert "--train-iters 600 may end before the target is met" in format_plan(short)


def test_nothing_to_prune() -> None:
    plan = _plan(SMOLLM_1700M, train_iters=10)
    found = plan_dict(plan)
    assert (found["units"], found["steps"], found["tokens"], found["continue_steps"]) == (0, 0, 0, 10)
    assert "pruning" not in format_plan(plan)


def test_table_is_aligned() -> None:
    lines = format_plan(_plan(SMOLLM_1700M, target_params="457M", export_at=("1.1B",))).split("\n\n")[0].splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1


def _tool(root: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "tools" / "plan.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root, check=False)


def test_tool_json_from_shapes(repo_root: Path) -> None:
    argv = f"--source-shape {SMOLLM_1700M} --target-shape hidden=1195,ffn=3006,heads=19 --prune-ratio 1:9".split()
    ran = _tool(repo_root, *argv, "--batch-tokens", "1048576", "--lr-warmup-iters", "500", "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert (found["units"], found["steps"], found["tokens"]) == (7724, 69516, 73_417_097_216)
    assert (found["parameters_source"], found["parameters_target"]) == (1_711_376_384, 456_930_955)


def test_tool_from_an_example_without_the_model(repo_root: Path) -> None:
    argv = ["--config", "examples/smollm_1.7b_to_457m.yaml", "--gpus", "32", "--tokens-per-second", "9200"]
    ran = _tool(repo_root, *argv, "--target-shape", "hidden=1195,ffn=3006,heads=19")
    assert ran.returncode == 0, ran.stderr
    assert "73.42 B" in ran.stdout
    assert "2,217" in ran.stdout  # GPU-hours at that rate; the paper's Table 11 has 2,166


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--target-params 1M", "no --source is given: give --source-shape"),
        (f"--source-shape {TINY} --target-params 5B", "is not below the source's"),
        (f"--source-shape {TINY} --target-parms 5B", "did you mean --target-params?"),
        (f"--source-shape {TINY} --prune-ratio 19", "is not a ratio"),
        (f"--source-shape {TINY} --target-params 50 --final-align 0", "--final-align 0 must be 1 or more"),
        (f"--source-shape {TINY} --micro-batch-size 0", "--micro-batch-size 0 must be 1 or more"),
        (f"--source-shape {TINY} --target-shape ffn=3 --sheared-iters 1", "--sheared-iters 1 must be 2 or more"),
        (f"--source-shape {TINY} --lr -1", "--lr -1.0 must be above 0"),
        (f"--source-shape {TINY} --gpus 0", "--gpus 0 must be above 0"),
        (f"--source-shape {TINY} --gpu-memory nan", "--gpu-memory nan must be above 0"),
        (f"--source-shape {TINY} --gpus 8 --tensor-model-parallel-size 3", "= 3 does not divide 8 GPU(s)"),
        (f"--source-shape {TINY} --tensor-model-parallel-size 0", "both must be 1 or more"),
        (f"--source-shape {TINY} --gpus 3 --pipeline-model-parallel-size 3", "is above the source's 2 layers"),
    ],
)
def test_tool_refuses_in_one_line(repo_root: Path, argv: str, words: str) -> None:
    ran = _tool(repo_root, *argv.split())
    assert ran.returncode == 2
    assert words in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert ran.stdout == ""


def test_what_tensor_parallel_ranks_hold_is_noted() -> None:
    layout = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 2}
    text = format_plan(_plan(QWEN_7B, num_gpus=32, **layout))
    assert "(TP 8 x PP 2 x DP 2)" in text
    assert "4 heads (32 for 28), 2 KV heads (16 for 4), 2,368 FFN channels (18,944 for 18,944)" in text
    assert "tensor parallel ranks" not in format_plan(_plan(QWEN_7B, num_gpus=32))


def test_tool_json_of_a_layout(repo_root: Path) -> None:
    argv = f"--source-shape {QWEN_7B} --target-params 5.2B --gpus 32 --tensor-model-parallel-size 2 --layouts".split()
    ran = _tool(repo_root, *argv, "--pipeline-model-parallel-size", "4", "--gpu-memory", "40", "--recompute", "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["layout"] == {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 4,
        "sequence_parallel": False,
        "data_parallel_size": 4,
        "micro_batches": 128,
        "bubble": pytest.approx(3 / 131),
    }
    assert found["fits"] is True
    assert found["verdict"].startswith("fits 40 GiB")
    (same,) = (
        row for row in found["layouts"] if (row["tensor_model_parallel_size"], row["data_parallel_size"]) == (2, 4)
    )
    assert same["memory_recomputed"] == found["phases"][0]["memory"]["total"]
    assert [row["recommended"] for row in found["layouts"]].count(True) == 1


def test_without_gpus_there_is_one_copy(repo_root: Path) -> None:
    ran = _tool(repo_root, *f"--source-shape {QWEN_7B} --tensor-model-parallel-size 4 --recompute".split())
    assert ran.returncode == 0, ran.stderr
    assert "(TP 4 x PP 1 x DP 1)" in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith("fits 80 GiB")


def test_tool_reads_a_source_directory(repo_root: Path, tmp_path: Path) -> None:
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    ran = _tool(repo_root, "--source", str(tmp_path), "--target-shape", "ffn=90", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["units"] == 6


def test_the_reduction_is_noted_where_it_is_more() -> None:
    noted = "when a step's gradients are reduced"
    assert noted in format_plan(_plan(SMOLLM_360M))
    assert noted not in format_plan(_plan(SMOLLM_360M, precision="fp32"))
    assert noted not in format_plan(_plan(QWEN_7B))
