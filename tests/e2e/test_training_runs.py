"""Whole runs: equalities between ways of doing the same training, and what a run leaves behind."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_prune.architecture import tensor_specs
from megatron_prune.checkpoint.hf import read_architecture
from megatron_prune.checkpoint.store import Checkpoint, complete_checkpoints, newest_checkpoint
from megatron_prune.pruning.ledger import parse_ledger, replay


def newest(run_dir: Path) -> Checkpoint:
    path = newest_checkpoint(run_dir)
    assert path is not None
    return Checkpoint(path)


@pytest.fixture(scope="module")
def baseline(workspace: Any) -> Path:
    """One uninterrupted single-process run that prunes all three types and then continues."""
    done = workspace.run(workspace.flags("baseline"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return Path(workspace.root / "baseline")


def test_the_run_prunes_to_the_target_and_continues(workspace: Any, baseline: Path, read_jsonl: Any) -> None:
    events = read_jsonl(baseline / "ledger.jsonl")
    assert {event["type"] for event in events} == {"attention", "ffn", "stem"}
    assert events[-1]["shape"] == {"hidden_size": 24, "ffn_hidden_size": 24, "num_attention_heads": 2}
    lines = [line for line in read_jsonl(baseline / "metrics.jsonl") if "loss" in line]
    assert lines[-1]["step"] == 40
    assert events[-1]["step"] < 40, "the second stage has steps of its own"
    assert lines[-1]["parameters"] == events[-1]["parameters"]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_learning_rate_is_constant_while_pruning_and_starts_afresh_after(baseline: Path, read_jsonl: Any) -> None:
    last_event = read_jsonl(baseline / "ledger.jsonl")[-1]["step"]
    rates = {line["step"]: line["lr"] for line in read_jsonl(baseline / "metrics.jsonl") if "loss" in line}
    assert [rates[1], rates[2]] == pytest.approx([1.5e-3, 3e-3]), "warm-up"
    assert {rates[step] for step in range(2, last_event + 1)} == {3e-3}
    assert rates[last_event + 1] == pytest.approx(1.5e-3), "the second stage warms up again"
    assert rates[40] < 1e-4, "and decays to its end"


def test_a_finished_run_started_again_changes_nothing(workspace: Any, baseline: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in baseline.glob("checkpoints/*/*")}
    metrics = (baseline / "metrics.jsonl").read_text()
    workspace.run_ok(workspace.flags("baseline"))
    assert {path: path.stat().st_mtime_ns for path in baseline.glob("checkpoints/*/*")} == before
    assert (baseline / "metrics.jsonl").read_text() == metrics


def test_convert_to_hf_exports_the_newest_checkpoint(workspace: Any, baseline: Path, tmp_path: Path) -> None:
    def convert(load: Path, save: Path) -> subprocess.CompletedProcess[str]:
        tool = workspace.repo / "tools" / "convert_to_hf.py"
        command = [sys.executable, str(tool), "--load", str(load), "--save", str(save)]
        return subprocess.run(command, capture_output=True, text=True)

    done = convert(baseline, tmp_path / "export")
    assert done.returncode == 0, done.stderr
    assert "bit for bit" in done.stdout
    assert read_architecture(tmp_path / "export").ffn_hidden_size == 24
    failed = convert(tmp_path / "none", tmp_path / "other")
    assert failed.returncode == 2
    assert "no complete checkpoint" in failed.stderr


@pytest.mark.parametrize("align", [1, 0], ids=["every-event", "never"])
def test_compaction_changes_no_decision_and_no_loss(
    workspace: Any, baseline: Path, assert_same_run: Any, align: int
) -> None:
    name = f"align{align}"
    workspace.run_ok(workspace.flags(name, prune_align=align))
    assert_same_run(baseline, workspace.root / name, 2e-6)


def test_two_data_parallel_processes_equal_one(workspace: Any, baseline: Path, assert_same_run: Any) -> None:
    workspace.run_ok(workspace.flags("dp2", micro_batch_size=1), processes=2)
    assert_same_run(baseline, workspace.root / "dp2", 1e-6)


@pytest.mark.parametrize(("processes", "step"), [(1, 6), (2, 12)])
def test_a_stopped_run_resumes_bit_for_bit(workspace: Any, assert_same_run: Any, processes: int, step: int) -> None:
    micro = 2 // processes
    whole, stopped = f"whole{processes}", f"stopped{processes}"
    workspace.run_ok(workspace.flags(whole, micro_batch_size=micro, prune_ratio="1:1"), processes)
    flags = workspace.flags(stopped, micro_batch_size=micro, prune_ratio="1:1")
    code = workspace.stop_at(flags, step, signal.SIGTERM, processes)
    assert code != 0
    if processes == 1:
        assert code == 75
    assert newest(workspace.root / stopped).manifest.progress.step < 40
    output = workspace.run_ok(flags, processes)
    assert "resuming" in output
    assert_same_run(workspace.root / whole, workspace.root / stopped, 0.0)
    finals = [newest(workspace.root / name) for name in (whole, stopped)]
    for spec in tensor_specs(finals[0].manifest.partition.source):
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(finals[0].live(spec, kind), finals[1].live(spec, kind)), (spec.name, kind)


def test_checkpoint_moves_between_data_parallel_sizes(workspace: Any, baseline: Path, assert_same_run: Any) -> None:
    flags = workspace.flags("moved", micro_batch_size=1)
    workspace.stop_at(flags, 5, signal.SIGTERM, processes=2)
    workspace.run_ok(flags, processes=1)
    assert_same_run(baseline, workspace.root / "moved", 2e-6)


def test_ledger_and_source_reproduce_the_pruned_model(workspace: Any, baseline: Path) -> None:
    source = read_architecture(workspace.source)
    partition = replay(source, parse_ledger((baseline / "ledger.jsonl").read_bytes()))
    checkpoint = newest(baseline)
    assert partition.architecture() == checkpoint.manifest.partition.architecture()
    assert partition.compacted(8).to_dict() == checkpoint.manifest.partition.compacted(8).to_dict()


def test_exports_at_budgets_load_and_are_the_first_under_them(workspace: Any, read_jsonl: Any) -> None:
    from transformers import AutoModelForCausalLM

    flags = workspace.flags("budgets", target_shape=None, target_params="12K", export_at="16K,14K,target")
    output = workspace.run_ok(flags)
    assert "logits within" in output
    events = read_jsonl(workspace.root / "budgets" / "ledger.jsonl")
    for name, budget in (("16K", 16_000), ("14K", 14_000)):
        directory = workspace.root / "budgets" / "exports" / name
        first = next(event["parameters"] for event in events if event["parameters"] <= budget)
        stored = load_file(directory / "model.safetensors")
        model: Any = AutoModelForCausalLM.from_pretrained(directory)
        assert model.num_parameters() == sum(tensor.numel() for tensor in stored.values())
        assert read_architecture(directory).hidden_size == next(
            event["shape"]["hidden_size"] for event in events if event["parameters"] == first
        )
        assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape[1] > 3
    end = read_architecture(workspace.root / "budgets" / "exports" / "target")
    assert (end.hidden_size, end.ffn_hidden_size) == tuple(
        events[-1]["shape"][width] for width in ("hidden_size", "ffn_hidden_size")
    )
    below = [event["parameters"] for event in events if event["parameters"] <= 12_000]
    assert below == [events[-1]["parameters"]], "pruning stops at the first shape at or under the target"


def test_random_and_magnitude_metrics_decide_differently(workspace: Any, baseline: Path, read_jsonl: Any) -> None:
    groups = {}
    for metric in ("magnitude", "random"):
        workspace.run_ok(workspace.flags(metric, prune_metric=metric, train_iters=25, eval_interval=0))
        groups[metric] = [str(e["removed"]) for e in read_jsonl(workspace.root / metric / "ledger.jsonl")]
    groups["taylor"] = [str(e["removed"]) for e in read_jsonl(baseline / "ledger.jsonl")]
    assert len({tuple(removed) for removed in groups.values()}) == 3


def test_bf16_and_recompute_train(workspace: Any, read_jsonl: Any) -> None:
    workspace.run_ok([*workspace.flags("bf16", precision="bf16"), "--recompute"])
    lines = [line for line in read_jsonl(workspace.root / "bf16" / "metrics.jsonl") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["hidden_size"] == 24


def test_keep_last_prunes_old_checkpoints(workspace: Any) -> None:
    flags = workspace.flags("keep", target_shape=None, train_iters=9, save_interval=2, eval_interval=0)
    workspace.run_ok(flags)
    names = [path.name for path in complete_checkpoints(workspace.root / "keep")]
    assert names == ["step_00000008", "step_00000009"]
    assert not list((workspace.root / "keep" / "checkpoints").glob(".writing*"))


def test_compiled_layers_train_the_same_across_a_compaction(workspace: Any, assert_same_run: Any) -> None:
    changes = {"train_iters": 6, "prune_ratio": "8:1", "target_shape": "hidden=30,ffn=40,heads=4", "eval_interval": 0}
    workspace.run_ok(workspace.flags("eager", **changes))
    done = workspace.run([*workspace.flags("compiled", **changes), "--compile"])  # the compiler forks workers
    assert done.returncode == 0, done.stderr[-4000:]
    assert "compaction" in done.stdout
    assert_same_run(workspace.root / "eager", workspace.root / "compiled", 2e-6)


def test_kernels_and_fallback_write_the_same_ledger(workspace: Any, assert_same_run: Any) -> None:
    fallback = [*workspace.flags("fallback"), "--op-impl", "saliency=torch"]
    kernels = [*workspace.flags("kernels"), "--op-impl", "saliency=csrc"]
    if importlib.util.find_spec("megatron_prune._C") is None:  # installed without a compiler
        refused = workspace.run(kernels)
        assert refused.returncode == 2
        assert "is not built" in refused.stderr
        return
    workspace.run_ok(fallback)
    workspace.run_ok(kernels)
    assert_same_run(workspace.root / "fallback", workspace.root / "kernels", 1e-6)
