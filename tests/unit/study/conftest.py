"""A study that is read from a file but not run, and results as it would have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.study.results import Results
from megatron_prune.study.settings import Study, read_study

Record = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def study(repo_root: Path) -> Study:
    """The study of ``make study``."""
    return read_study(repo_root / "examples" / "study" / "study.yaml")


@pytest.fixture
def record() -> Record:
    """Makes one run's record."""

    def make(row: str | None, seed: int | None, stage: str, loss: float, source: str = "small") -> dict[str, Any]:
        shape = {"hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2}
        shares = {"next_word": 0.5, "next_name": 0.25, "line_end": 0.75}
        model = {"parameters": 100, "shape": shape, "val_loss": loss, "acc": shares, "acc_norm": shares}
        base = {"source": source, "row": row, "seed": seed, "tokens": 2048, "pruning_tokens": 1024, "removals": 3}
        return {**base, "key": f"{source}/{row}/{seed}", "models": {stage: model}}

    return make


@pytest.fixture
def results(record: Record) -> Callable[..., Results]:
    """Makes results of three seeds from losses by row and stage; the source has a loss of 1."""

    def make(**losses: tuple[str, list[float]]) -> Results:
        records = [record(None, None, "final", 1.0)]
        for name, (stage, values) in losses.items():
            row = name.replace("_", "-")
            records += [record(row, seed, stage, value) for seed, value in enumerate(values, 1)]
        facts = {"format": 1, "seeds": [1, 2, 3], "sources": {"small": {"budget": "100", "made": "given"}}}
        return Results(facts, tuple(records))

    return make
