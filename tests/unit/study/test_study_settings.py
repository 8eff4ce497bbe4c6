"""The study's file and the runs it makes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.config import load_config
from megatron_prune.errors import UserError
from megatron_prune.study.runs import RESULT_FILE, Run, all_runs, chosen_runs, weight_hashes
from megatron_prune.study.settings import Study, read_study
from megatron_prune.study.tables import METRICS, ORDERS, SCHEMES, metric_row


@pytest.fixture
def runs(study: Study, tmp_path: Path) -> list[Run]:
    """All runs of the study."""
    return all_runs(study, "data", tmp_path)


def test_every_row_of_the_tables_is_run_with_three_seeds(study: Study, runs: list[Run]) -> None:
    rows = {*SCHEMES, *ORDERS, *(metric_row(metric, aware)[0] for metric in METRICS for aware in (False, True))}
    for row in rows:
        assert sum(run.key.startswith(f"small/{row}/") for run in runs) == len(study.seeds) >= 3, row
    assert len(study.sources) == 2


def test_rows_of_one_table_see_equal_tokens(runs: list[Run]) -> None:
    def tokens(settings: Mapping[str, Any]) -> int:
        samples = settings["train_iters"] * settings["global_batch_size"] + settings.get("few_shot_samples", 0)
        return int(samples * settings["seq_length"])

    for rows in (set(SCHEMES), {metric_row(metric, aware=True)[0] for metric in METRICS}):
        chosen = [run for run in runs if run.row is not None and run.row.name in rows]
        assert all(run.row is not None and run.row.continued for run in chosen)
        assert len({tokens(run.settings) for run in chosen}) == 1


def test_settings_are_flags_of_the_trainer(runs: list[Run], tmp_path: Path) -> None:
    for run in runs:
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(run.settings))
        assert load_config(["--config", str(path)]).data.seq_length == run.settings["seq_length"]


def test_a_run_comes_after_those_it_needs(runs: list[Run]) -> None:
    keys = [run.key for run in runs]
    assert len(set(keys)) == len(keys)
    for place, run in enumerate(runs):
        assert {need.key for need in run.needs} <= set(keys[:place])
    searched = next(run for run in runs if run.key == "small/direct-searched/2")
    assert [need.key for need in searched.needs] == ["small/source", "small/unified/2"]


def test_choosing_takes_along_what_is_needed(runs: list[Run]) -> None:
    keys = [run.key for run in chosen_runs(runs, ["small/order-ffn-stem-attention/3"])]
    assert keys == ["small/source", "small/unified/3", "small/order-ffn-stem-attention/3"]
    assert chosen_runs(runs, []) == runs
    with pytest.raises(UserError, match="--only huge is no run; they are named SOURCE/ROW/SEED"):
        chosen_runs(runs, ["huge"])


def test_a_result_counts_for_its_very_settings(runs: list[Run], study: Study) -> None:
    run = next(run for run in runs if run.key == "small/direct-searched/1")
    assert run.result() is None
    run.directory.mkdir(parents=True)
    (run.directory / RESULT_FILE).write_text(json.dumps({"fingerprint": run.fingerprint}))
    assert run.result() is not None
    changed = [
        dataclasses.replace(run, data="other"),
        dataclasses.replace(run, study=dataclasses.replace(study, split="9,1,0")),
        dataclasses.replace(run, study=dataclasses.replace(study, settings={**study.settings, "lr": 1.0})),
        dataclasses.replace(run, source=dataclasses.replace(run.source, budget="140K")),
    ]
    assert [other.result() for other in changed] == [None] * len(changed)
    # What the run that finds its shape does counts, too; what rows there are beside it does not.
    pruning = dataclasses.replace(study, pruning={"prune_ratio": "9:1"})
    assert dataclasses.replace(run, study=pruning).result() is None
    fewer = dataclasses.replace(run.source, rows=("unified", "direct-searched"))
    assert dataclasses.replace(run, source=fewer).result() is not None
    (run.directory / RESULT_FILE).write_text("{")
    assert run.result() is None


SMALLEST = """
tokenizer: t
split: "9,1,0"
seeds: [1]
sources: {small: {path: p, budget: 1K}}
rows: {unified: {goal: budget}}
"""


def test_the_smallest_study(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SMALLEST)
    study = read_study(tmp_path / "s.yaml")
    assert study.sources["small"].rows == ("unified",)
    assert [run.key for run in all_runs(study, "", tmp_path)] == ["small/source", "small/unified/1"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [1]", "seeds: 1", "seeds 1 must be a list of whole numbers"),
        ("seeds: [1]", "seed: [1]", "unknown key 'seed'.*seeds"),
        ("seeds: [1]", "", "lacks seeds"),
        ("path: p,", "", "needs a budget, and either"),
        ("path: p,", "path: p, shape: {},", "needs a budget, and either"),
        ("budget: 1K", "budget: 1K, rows: [unifed]", "unknown row 'unifed'.*unified"),
        ("budget: 1K", "budget: 1K, rows: [late]", "needs row unified"),
        ("goal: budget}", "goal: less}", "goal 'less' is none of none, budget"),
        ("goal: budget}", "start: searched}", "finds the searched shape"),
        ("rows: {unified: {goal: budget}}", "rows: [unified]", "rows must be names with values"),
        ("tokenizer: t", "tokenizer: [", "cannot be read"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = SMALLEST.replace("budget}}", "budget}, late: {start: searched}}") if "late" in new else SMALLEST
    (tmp_path / "s.yaml").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        read_study(tmp_path / "s.yaml")


def test_the_weights_of_a_given_source_count(study: Study, tmp_path: Path) -> None:
    def fingerprint(weights: bytes) -> str:
        (tmp_path / "model.safetensors").write_bytes(weights)
        source = dataclasses.replace(study.sources["demo"], path=str(tmp_path))
        weight_hashes.cache_clear()
        return Run(study, source, None, None, "data", tmp_path).fingerprint

    assert weight_hashes(Path(study.sources["demo"].path or "")).keys() == {"model.safetensors"}
    assert fingerprint(b"1") != fingerprint(b"2")
