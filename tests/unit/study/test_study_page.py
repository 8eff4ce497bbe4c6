"""The page says what the results say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prune.errors import UserError
from megatron_prune.study.claims import first_paragraph, second_paragraph
from megatron_prune.study.document import PAGE, page
from megatron_prune.study.figures import write_figures
from megatron_prune.study.results import Results, Spread, accuracy, loss, read_results, write_results
from megatron_prune.study.tables import METRICS, metric_row, same_as_taylor, table

Make = Callable[..., Results]


@pytest.fixture(scope="module")
def committed(repo_root: Path) -> Results:
    """The results that the repository carries."""
    return read_results(repo_root / "examples" / "study" / "results.json")


def test_the_page_is_what_the_committed_results_make(repo_root: Path, committed: Results) -> None:
    assert (repo_root / "docs" / PAGE).read_text(encoding="utf-8") == page(committed)


def test_figures_are_those_that_the_page_shows(committed: Results, tmp_path: Path) -> None:
    names = {path.name for path in write_figures(committed, tmp_path)}
    assert names == {path.name for path in tmp_path.iterdir()}
    assert all(f"]({name})" in page(committed) for name in names)
    assert page(committed).count(".png)") == len(names)


def test_committed_results_have_three_seeds_and_all_metrics(committed: Results) -> None:
    assert len(committed.facts["seeds"]) >= 3
    for row in (metric_row(metric, aware)[0] for metric in METRICS for aware in (False, True)):
        assert [record["seed"] for record in committed.of("small", row)] == committed.facts["seeds"], row


def test_clearly_worse_is_when_no_seed_is_as_good(results: Make) -> None:
    taylor = ("final", [2.0, 2.1, 2.2])
    random, magnitude = ("final", [2.3, 2.4, 2.5]), ("final", [2.15, 2.4, 2.5])
    text = first_paragraph(results(metric_taylor=taylor, metric_random=random, metric_magnitude=magnitude))
    assert "`random` is clearly worse (2.400 ± 0.100)" in text
    assert "`magnitude` is not clearly worse (2.350 ± 0.180)" in text
    assert "than `taylor` (2.100 ± 0.100 held-out loss)" in text
    assert text.startswith("Pruned while training for 2,048 tokens, ")
    assert ", and no metric has a lower loss than it." in text
    text = first_paragraph(results(metric_taylor=taylor, metric_random=random, metric_obc=("final", [1.0, 1.5, 2.05])))
    assert "and lower than it is `obc` (1.517 ± 0.525, within the spread of the seeds)." in text


def test_a_weak_metric_that_wins_is_said_to(results: Make) -> None:
    text = first_paragraph(results(alone_taylor=("pruned", [2.0, 2.1, 2.2]), alone_random=("pruned", [1.0, 1.1, 1.2])))
    assert text.startswith("Pruned all at once without training, `random` is clearly better (1.100 ± 0.100) than")


def test_a_baseline_that_wins_is_said_to(results: Make) -> None:
    ours = ("final", [2.0, 2.1, 2.2])
    better, worse = ("final", [1.5, 1.6, 1.7]), ("final", [9.0] * 3)
    text = first_paragraph(results(unified=ours, few_shot=better, direct_hidden=worse))
    assert "is beaten by few-shot pruning, then training (1.600 ± 0.100, clearly)" in text
    assert "direct" not in text
    text = first_paragraph(results(unified=ours, few_shot=("final", [1.9, 2.1, 2.25])))
    assert "(2.083 ± 0.176, within the spread of the seeds)" in text
    text = first_paragraph(results(unified=ours, few_shot=("final", [2.9, 2.1, 2.2])))
    assert "no baseline has a lower loss than unified pruning-aware pretraining (2.100 ± 0.100)" in text


def test_margins_are_of_the_same_seeds(results: Make) -> None:
    text = second_paragraph(results(unified=("final", [1.0, 2.0, 3.0]), few_shot=("final", [1.5, 2.5, 3.5])))
    assert "- few-shot pruning, then training: +0.500 ± 0.000" in text


def test_spread_is_the_sample_deviation() -> None:
    assert Spread((1.0, 2.0, 4.0)).text() == f"{7 / 3:.3f} ± {math.sqrt(7 / 3):.3f}"
    assert Spread((5.0,)).deviation == 0.0
    assert Spread((1.0, 2.0)).apart(Spread((2.5, 3.0)))
    assert Spread((2.5, 3.0)).apart(Spread((1.0, 2.0)))
    assert not Spread((1.0, 2.0)).apart(Spread((2.0, 3.0)))
    assert not Spread((1.0,)).apart(Spread((2.0,))), "a single seed says nothing of the others"


def test_numbers_that_some_seed_lacks_are_no_numbers(results: Make) -> None:
    made = results(unified=("final", [1.0, 2.0, 3.0]))
    assert made.spread("small", "unified", loss("pruned")) is None
    assert made.spread("small", "unknown", loss("final")) is None
    mean = made.spread("small", "unified", accuracy("final"))
    assert mean is not None
    assert mean.values == (50.0, 50.0, 50.0)


def test_results_come_back_as_they_were(results: Make, tmp_path: Path) -> None:
    made = results(unified=("final", [1.0, 0.1, 1 / 3]))
    write_results(made, tmp_path / "r.json")
    assert read_results(tmp_path / "r.json") == made
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(UserError, match="holds no results of a study"):
        read_results(tmp_path / "bad.json")
    (tmp_path / "old.json").write_text('{"facts": {"format": 0}, "records": []}')
    with pytest.raises(UserError, match="format 0, not 1"):
        read_results(tmp_path / "old.json")


def test_a_table_is_markdown() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


#: Rows of the README's table by the row of the study they quote.
QUOTED = {
    "the found shape from random weights": "direct-searched",
    "ShearedLlama, all widths in proportion": "sheared-uniform",
    "**pruning while training**": "unified",
    "pruning at once (128 samples), then training": "few-shot",
}


def test_the_readme_quotes_the_page(repo_root: Path, committed: Results) -> None:
    readme = (repo_root / "README.md").read_text(encoding="utf-8")
    lines = [line for line in readme.splitlines() if "±" in line]
    quoted = {label: cells for label, *cells in (re.split(r" *\| *", line.strip("| ")) for line in lines)}
    assert quoted.keys() == QUOTED.keys()
    for label, row in QUOTED.items():
        for source, cell in zip(("small", "demo"), [*quoted[label], ""], strict=False):
            spread = committed.spread(source, row, loss("final"))
            assert cell == ("" if spread is None else spread.text()), f"{label}, {source}"


def test_rows_that_agree_with_taylor_are_named(results: Make) -> None:
    taylor = ("final", [2.0, 2.1, 2.2])
    made = results(metric_taylor=taylor, metric_taylor_mixed=taylor, metric_obc=("final", [2.0, 2.1, 2.3]))
    assert same_as_taylor(made, "small") == ["taylor-mixed"]
