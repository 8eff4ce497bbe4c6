"""One run of the study in this process: train by ``pretrain_prune.py``'s own main, measure, write the result.

Everything slow to import is imported here at the top: worker processes are forked from one that has done so.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers.models.llama.modeling_llama
import transformers.models.mistral.modeling_mistral  # noqa: F401  what exports are loaded with

import megatron_prune.training.setup  # noqa: F401  DeepSpeed comes with it
from megatron_prune import pretrain
from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.baselines import baseline_shapes, write_config
from megatron_prune.checkpoint.hf import copy_companions, export_verified, read_architecture, read_config
from megatron_prune.checkpoint.store import SOURCE_DIR, Checkpoint, newest_checkpoint
from megatron_prune.config.values import parse_count
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.errors import MegatronPruneError
from megatron_prune.evaluation.scoring import load_causal_lm, score_questions, validation_loss
from megatron_prune.study.heldout import held_out_batches, saved_questions
from megatron_prune.study.runs import LOG_FILE, RESULT_FILE, Run
from megatron_prune.training.report import METRICS_FILE, read_jsonl
from megatron_prune.training.run_dir import replace_text

CONFIG_FILE: Final = "run.yaml"
MODEL_DIR: Final = "model"
_SHARD_BYTES: Final = 1 << 30


def run_in_worker(run: Run, prefix: str) -> None:
    """Execute a run in a process of its own, its output in ``log.txt``; the exit code tells how it went."""
    if run.row is not None or not _same_settings(run, prefix):
        shutil.rmtree(run.directory, ignore_errors=True)  # only a source takes long enough to be worth resuming
    run.directory.mkdir(parents=True, exist_ok=True)
    log = os.open(run.directory / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    torch.set_num_threads(1)  # one order of sums, so the same numbers again
    try:
        execute(run, prefix)
    except MegatronPruneError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def execute(run: Run, prefix: str) -> None:
    """Train, measure, write ``result.json``, and remove what is not needed any more.

    Args:
        run: what to do; those it needs are finished.
        prefix: of the tokenised text.

    Raises:
        MegatronPruneError: the trainer ended with another code than 0, or has not reached the goal.
    """
    began = time.monotonic()
    models = _given(run) if run.row is None and run.source.path is not None else _train(run, prefix)
    record: dict[str, Any] = {"key": run.key, "fingerprint": run.fingerprint, "source": run.source.name}
    record |= {"row": None if run.row is None else run.row.name, "seed": run.seed}
    record |= _history(run)
    record["models"] = {stage: _measure(run, directory, prefix) for stage, directory in models.items()}
    # A source keeps its checkpoint: measured in another way, it need not be trained again.
    for leftover in () if run.row is None else ("checkpoints", "exports", "start", MODEL_DIR, SOURCE_DIR):
        shutil.rmtree(run.directory / leftover, ignore_errors=True)
    # Seconds are no result: they are beside it, where a comparison of two studies does not look.
    (run.directory / "seconds").write_text(f"{time.monotonic() - began:.1f}\n")
    replace_text(run.directory / RESULT_FILE, json.dumps(record, indent=1) + "\n")


def model_directory(run: Run) -> Path:
    """Where a source's model is."""
    return run.directory / MODEL_DIR if run.source.path is None else Path(run.source.path)


def _given(run: Run) -> dict[str, Path]:
    return {"final": model_directory(run)}


def _train(run: Run, prefix: str) -> dict[str, Path]:
    """Run the trainer; returns the models that it leaves, by the stage they are of."""
    _prepare_start(run)
    settings = _all_settings(run, prefix)
    config = run.directory / CONFIG_FILE
    config.write_text(_as_text(settings))
    code = pretrain.main(["--config", str(config)])
    if code != 0:
        raise MegatronPruneError(f"{run.key}: the trainer ended with exit code {code}")
    models = {}
    if run.row is not None and run.row.goal != "none":
        snapshots = list((run.directory / "exports").glob("*"))
        if len(snapshots) == 1:
            models["pruned"] = snapshots[0]
        elif "sheared_iters" not in run.row.settings or snapshots:
            raise MegatronPruneError(f"{run.key}: the goal was not met in {settings['train_iters']} steps; give more")
    if run.row is None or (run.row.continued and not run.row.alone):
        models["final"] = run.directory / MODEL_DIR
        _export(run.directory, models["final"])
    return models


def _all_settings(run: Run, prefix: str) -> dict[str, Any]:
    return run.settings | _places(run, prefix) | _goal(run)


def _as_text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=1) + "\n"  # every JSON object is YAML


def _same_settings(run: Run, prefix: str) -> bool:
    """True if what a source's directory holds was begun with these settings and can be resumed or measured again."""
    config = run.directory / CONFIG_FILE
    return config.is_file() and config.read_text() == _as_text(_all_settings(run, prefix))


def _prepare_start(run: Run) -> None:
    """A model directory without weights for a run that starts from random ones."""
    start = run.directory / "start"
    if run.row is None:
        write_config(start, _source_shape(run), {})
    elif run.row.start != "source":
        write_config(start, _shapes(run)[run.row.start], read_config(model_directory(run.needs[0])))
    if start.exists():
        copy_companions(Path(run.study.tokenizer), start)


def _places(run: Run, prefix: str) -> dict[str, Any]:
    random_weights = run.row is None or run.row.start != "source"
    return {
        "source": str(run.directory / "start" if random_weights else model_directory(run.needs[0])),
        "data_path": [prefix],
        "split": run.study.split,
        "save": str(run.directory),
        "save_interval": 200 if run.row is None else 0,
        "eval_interval": 0,
        "log_interval": 10,
    }


def _goal(run: Run) -> dict[str, Any]:
    if run.row is None or run.row.goal == "none":
        return {}
    if run.row.goal == "budget":
        return {"target_params": run.source.budget, "export_at": run.source.budget}
    shape = _shapes(run)[run.row.goal]
    widths = f"hidden={shape.hidden_size},ffn={shape.ffn_hidden_size},heads={shape.num_attention_heads}"
    return {"target_shape": widths, "export_at": str(shape.num_parameters())}


def _source_shape(run: Run) -> Architecture:
    """A Llama with a K/V head for each query head and tied embeddings."""
    assert run.source.shape is not None
    shape = run.source.shape
    layers, heads = shape["num_layers"], shape["num_attention_heads"]
    return Architecture(
        family="llama",
        num_layers=layers,
        hidden_size=shape["hidden_size"],
        ffn_hidden_size=shape["ffn_hidden_size"],
        num_attention_heads=heads,
        kv_groups=uniform_kv_groups(layers, heads, heads),
        head_dim=shape["hidden_size"] // heads,
        vocab_size=load_tokenizer(run.study.tokenizer).vocab_size,
        tie_embeddings=True,
    )


def _shapes(run: Run) -> Mapping[str, Architecture]:
    """The shapes of direct pretraining; the searched one only where the run waits for it."""
    searched = None
    assert run.row is not None
    if run.row.needs_search:
        found = run.searching.result()
        assert found is not None, f"{run.key} was started before {run.searching.key} had finished"
        shape = found["models"]["pruned"]["shape"]
        searched = (shape["hidden_size"], shape["ffn_hidden_size"], shape["num_attention_heads"])
    source = read_architecture(model_directory(run.needs[0]))
    return baseline_shapes(source, parse_count(run.source.budget), searched)


def _export(run_dir: Path, directory: Path) -> None:
    newest = newest_checkpoint(run_dir)
    assert newest is not None, f"{run_dir} has no checkpoint after a run that finished"
    checkpoint = Checkpoint(newest)
    specs = checkpoint.specs()
    export_verified(
        directory,
        checkpoint.manifest.partition.architecture(),
        lambda name: checkpoint.live(specs[name]),
        dtype=torch.float32,
        tokenizer_dir=run_dir / SOURCE_DIR,
        source_config=read_config(run_dir / SOURCE_DIR),
        max_shard_bytes=_SHARD_BYTES,
    )


def _history(run: Run) -> dict[str, Any]:
    """Tokens of the run and of its pruning stage, and the removals where they are wanted."""
    if run.row is None and run.source.path is not None:
        return {"tokens": run.source.tokens, "pruning_tokens": 0, "removals": 0}
    metrics = read_jsonl(run.directory / METRICS_FILE)
    tokens = max(int(record["tokens"]) for record in metrics if "tokens" in record)
    ledger = run.directory / "ledger.jsonl"
    events = read_jsonl(ledger) if ledger.is_file() else []
    history: dict[str, Any] = {"tokens": tokens, "removals": len(events)}
    history["pruning_tokens"] = events[-1]["tokens"] if events else 0
    if run.row is not None and run.row.trace:
        keys = ("tokens", "type", "scores", "shape", "parameters")
        history["events"] = [{key: event[key] for key in keys} for event in events]
    return history


def _measure(run: Run, directory: Path, prefix: str) -> dict[str, Any]:
    """Shape, held-out loss and the share of right answers of a model, all by stock transformers."""
    architecture = read_architecture(directory)
    model, tokenizer = load_causal_lm(directory)
    loss = validation_loss(model, held_out_batches(run.study, prefix, architecture.vocab_size))
    questions = saved_questions(prefix)
    scores = {task: score_questions(model, tokenizer, asked) for task, asked in questions.items()}
    return {
        "parameters": architecture.num_parameters(),
        "shape": {
            "hidden_size": architecture.hidden_size,
            "ffn_hidden_size": architecture.ffn_hidden_size,
            "num_attention_heads": architecture.num_attention_heads,
        },
        "val_loss": loss,
        "acc": {task: score.acc for task, score in scores.items()},
        "acc_norm": {task: score.acc_norm for task, score in scores.items()},
    }
