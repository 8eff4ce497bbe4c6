"""Run directories as the package's own writers leave them, without the hours of training."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prune.architecture import Architecture, uniform_kv_groups
from megatron_prune.checkpoint.hf_config import hf_config_from_architecture
from megatron_prune.config import Config, dump_yaml, parse_count
from megatron_prune.parallel.partition import Partition
from megatron_prune.pruning.groups import GroupType, MiniGroup, remove
from megatron_prune.pruning.ledger import Event, Ledger, shape_of
from megatron_prune.training.report import Reporter

STEPS, BATCH, SEQ_LENGTH = 400, 8, 64
SOURCE = Architecture("llama", 12, 96, 256, 12, uniform_kv_groups(12, 12, 12), 8, 512)
TARGET = "800K"  # of 1.43 M, which the run meets near step 220
EXPORTS = ("1.3M", "1.1M", "850K")

MakeRun = Callable[..., Path]


def _config(directory: Path) -> Config:
    config = Config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, source="models/small"),
        data=dataclasses.replace(config.data, data_path=("data/text",), seq_length=SEQ_LENGTH),
        train=dataclasses.replace(config.train, train_iters=STEPS, global_batch_size=BATCH),
        prune=dataclasses.replace(config.prune, target_params=TARGET, export_at=EXPORTS),
        run=dataclasses.replace(config.run, save=str(directory)),
    )


def _prune(ledger: Ledger, upto: int, log: Callable[[int, Architecture], None]) -> None:
    """A removal every other step from step 40 on, until the target is met; ``log`` is called after every step."""
    draw, partition = random.Random(0), Partition.of(SOURCE)
    left = {"ffn": [list(range(SOURCE.ffn_hidden_size)) for _ in range(SOURCE.num_layers)]}
    left["attention"] = [list(range(SOURCE.num_attention_heads)) for _ in range(SOURCE.num_layers)]
    left["stem"] = [list(range(SOURCE.hidden_size))]
    few: tuple[GroupType, ...] = ("stem", "ffn", "ffn", "ffn", "ffn", "ffn", "ffn", "ffn")
    order: tuple[GroupType, ...] = (*few, "attention", *few[1:])
    for step in range(1, upto + 1):
        arch = partition.architecture()
        if step > 40 and step % 2 and arch.num_parameters() > parse_count(TARGET):
            kind = order[step // 2 % len(order)]
            picks = tuple(units.pop(draw.randrange(len(units))) for units in left[kind])
            group = MiniGroup(kind, picks[0] if kind == "stem" else picks)
            partition = remove(partition, group)
            arch = partition.architecture()
            scores = {name: 1e-5 * (1 + place / 4 + step / 200) for place, name in enumerate(left)}
            event = Event(
                len(ledger.events) + 1,
                step,
                step * BATCH * SEQ_LENGTH,
                kind,
                group.listed(),
                scores,
                shape_of(arch),
                arch.num_parameters(),
            )
            ledger.append(event)
        log(step, arch)


@pytest.fixture(scope="session")
def make_run() -> MakeRun:
    """Writes a run up to a step: config, metrics, ledger, the source's shape, exports that are due, a checkpoint."""

    def make(directory: Path, upto: int = STEPS) -> Path:
        config = _config(directory)
        (directory / "source").mkdir(parents=True)
        described = hf_config_from_architecture(SOURCE, torch_dtype="float32", extra={})
        (directory / "source" / "config.json").write_text(json.dumps(described))
        (directory / "config.yaml").write_text(dump_yaml(config))
        ledger = Ledger(directory / "ledger.jsonl")
        with Reporter(directory, config, is_main=True, total_steps=STEPS) as reporter:

            def log(step: int, arch: Architecture) -> None:
                loss, tokens = 3 + 3 * math.exp(-step / 60) + math.sin(step) / 9, step * BATCH * SEQ_LENGTH
                line = {"step": step, "tokens": tokens, "loss": loss, "grad_norm": 1.5 + math.cos(step) / 3}
                line |= {"lr": 1e-3 * (1 - step / 500), "tokens_per_second": 9e3 + 20 * step, "mfu": 0.41}
                line |= {"memory_bytes": 3e9 - 4e6 * step, "parameters": arch.num_parameters(), **shape_of(arch)}
                if step % 2 == 0:
                    reporter.log(line)
                if step % 50 == 0:
                    reporter.log({"step": step, "tokens": tokens, "val_loss": loss + 0.2})

            _prune(ledger, upto, log)
        for name in EXPORTS:
            if ledger.events and ledger.events[-1].parameters <= parse_count(name):
                (directory / "exports" / name).mkdir(parents=True)
                (directory / "exports" / name / "config.json").write_text("{}")
        complete = directory / "checkpoints" / f"step_{upto // 100 * 100:08d}"
        complete.mkdir(parents=True)
        (complete / "COMPLETE").write_text("")
        return directory

    return make
