"""Asked to stop in any phase, a run saves within one step; started again, it ends as if nothing had happened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hosts import TinyRun, read_lines
from layout_runs import Cluster
from safetensors.torch import load_file

from megatron_prune.checkpoint.manifest import Manifest
from megatron_prune.checkpoint.store import complete_checkpoints
from megatron_prune.config.values import parse_count
from megatron_prune.training.signals import STOP_FILE

WORKER = Path(__file__).with_name("stop_worker.py")
STEPS, EVAL_INTERVAL, SAVE_INTERVAL = 12, 4, 5
#: The first is crossed by the last removal of a step, the second by the first of two.
BUDGETS = ("14.1K", "13.7K")


class Job:
    """The same run again and again, alone or on two tensor-parallel ranks, in run directories of its own."""

    def __init__(self, cluster: Cluster, tiny: TinyRun) -> None:
        self._cluster = cluster
        self._tiny = tiny

    def run(self, name: str, phase: str = "none", call: int = 1, processes: int = 1) -> Path:
        """Start it, or start it again; returns its directory."""
        layout = ["--tensor-model-parallel-size", str(processes)]
        values = {
            "eval-interval": EVAL_INTERVAL,
            "eval-iters": 3,
            "save-interval": SAVE_INTERVAL,
            "keep-last": 9,
            "export-at": ",".join(BUDGETS),
            "split": "80,20,0",
        }
        extra = [word for flag, value in values.items() for word in (f"--{flag}", str(value))]
        flags = self._tiny.flags(name, [*layout, *extra], STEPS)
        self._cluster.run(WORKER, [phase, str(call), *flags], processes, self._tiny.root)
        return self._tiny.root / name


@pytest.fixture(scope="module")
def job(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Job:
    return Job(cluster, TinyRun.make(tmp_path_factory.mktemp("stops"), repo_root))


@pytest.fixture(scope="module")
def undisturbed(job: Job) -> Path:
    return job.run("undisturbed")


def record(run_dir: Path) -> tuple[list[Any], list[Any], list[Any]]:
    """All that a run leaves which must not depend on where it was stopped."""
    timing = ("tokens_per_second", "mfu")
    metrics = [
        {key: value for key, value in line.items() if key not in timing}
        for line in read_lines(run_dir / "metrics.jsonl")
    ]
    loaded = [load_file(run_dir / "exports" / name / "model.safetensors") for name in BUDGETS]
    exports = [{name: tensor.tolist() for name, tensor in tensors.items()} for tensors in loaded]
    return metrics, read_lines(run_dir / "ledger.jsonl"), exports


def saved_steps(run_dir: Path) -> list[int]:
    return [Manifest.read(path).progress.step for path in complete_checkpoints(run_dir)]


def validated(run_dir: Path) -> Sequence[int]:
    return [line["step"] for line in read_lines(run_dir / "metrics.jsonl") if "val_loss" in line]


def test_the_run_goes_through_every_phase(undisturbed: Path) -> None:
    assert validated(undisturbed) == [4, 8, 12]
    assert saved_steps(undisturbed) == [5, 10, 12]
    assert sorted(path.name for path in (undisturbed / "exports").iterdir()) == sorted(BUDGETS)


@pytest.mark.parametrize(
    ("phase", "call"),
    [
        ("loading", 1),
        ("training", 3),
        ("decision", 4),
        ("zeroing", 5),
        ("compaction", 1),
        ("checkpoint", 1),
        ("validation", 2),
        ("validation", 7),  # the first global batch of the last step's
        ("export", 2),
        ("file", 6),
    ],
)
def test_a_stop_in_any_phase_changes_nothing(job: Job, undisturbed: Path, phase: str, call: int) -> None:
    name = f"{phase}{call}"
    stopped = job.run(name, phase, call)
    asked = int((stopped / "signalled").read_text())
    assert asked <= saved_steps(stopped)[-1] <= asked + 1, "saved within one step"
    assert not list((stopped / "checkpoints").glob(".*")), "and completely"
    assert not (stopped / STOP_FILE).exists(), "a run that is started again must not stop at once"
    if phase == "validation":
        assert asked not in validated(stopped), "a part of a validation is none"
    assert record(job.run(name)) == record(undisturbed)


@pytest.mark.parametrize(("budget", "exported"), [(0, []), (1, [*BUDGETS])])
def test_an_export_not_begun_is_left_to_the_next_start(
    job: Job, undisturbed: Path, budget: int, exported: list[str]
) -> None:
    """Only where the checkpoint holds the shape to export: a step that goes on to remove more exports first."""
    events = read_lines(undisturbed / "ledger.jsonl")
    limit = parse_count(BUDGETS[budget])
    crossing = next(number for number, event in enumerate(events, 1) if event["parameters"] <= limit)
    assert (events[crossing - 1]["step"] == events[crossing]["step"]) == bool(exported)
    name = f"unexported{budget}"
    stopped = job.run(name, "zeroing", crossing)
    assert sorted(path.name for path in (stopped / "exports").glob("*")) == sorted(exported)
    assert record(job.run(name)) == record(undisturbed)


@pytest.mark.parametrize(("phase", "call"), [("validation", 2), ("decision", 4)])
def test_one_rank_asked_is_all_ranks_asked(job: Job, undisturbed: Path, phase: str, call: int) -> None:
    stopped = job.run(f"two-{phase}", phase, call, processes=2)
    asked = int((stopped / "signalled").read_text())
    assert asked <= saved_steps(stopped)[-1] <= asked + 1
    resumed = job.run(f"two-{phase}", processes=2)
    assert validated(resumed) == validated(undisturbed)
    assert len(read_lines(resumed / "ledger.jsonl")) == len(read_lines(undisturbed / "ledger.jsonl"))
