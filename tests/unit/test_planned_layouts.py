"""The verdict on a layout: what is recommended fits, and what is suggested helps."""

from __future__ import annotations

import itertools
import re

import pytest

from megatron_prune.architecture import Architecture
from megatron_prune.config import Config, load_config, parse_source_shape
from megatron_prune.layouts import (
    RESERVE,
    all_layouts,
    bubble,
    fit_sentence,
    format_layouts,
    layouts_dict,
    make_layout,
    recommended,
)
from megatron_prune.memory import GIB

LLAMA_7B = "hidden=4096,ffn=11008,heads=32,kv_heads=32,head_dim=128,layers=32,vocab=32000"
RUN = f"--source-shape {LLAMA_7B} --target-params 3.3B --micro-batch-size 2"


def _config(flags: str = "") -> Config:
    return load_config(f"{RUN} {flags}".split())


def _source() -> Architecture:
    return parse_source_shape(LLAMA_7B)


def test_bubble() -> None:
    assert bubble(1, 7) == 0
    assert bubble(4, 1) == 0.75
    assert bubble(4, 9) == 0.25


def test_all_layouts_divide_the_gpus() -> None:
    found = [(layout.tensor, layout.pipeline) for layout in all_layouts(_config(), _source(), 24)]
    sizes = (1, 2, 4, 8)
    assert sorted(found) == [pair for pair in itertools.product(sizes, sizes) if 24 % (pair[0] * pair[1]) == 0]
    shallow = parse_source_shape(LLAMA_7B.replace("layers=32", "layers=3"))
    assert {layout.pipeline for layout in all_layouts(_config(), shallow, 64)} == {1, 2}


@pytest.mark.parametrize("gibibytes", [8, 16, 24, 40, 48, 64, 80, 141])
@pytest.mark.parametrize("flags", ["", "--recompute", "--recompute --sequence-parallel"])
def test_recommended_is_the_smallest_that_fits(gibibytes: int, flags: str) -> None:
    config = _config(flags)
    layouts, gpu = all_layouts(config, _source(), 32), gibibytes * GIB
    best = recommended(layouts, gpu)
    for recompute in sorted({config.train.recompute, True}):
        fitting = [layout for layout in layouts if layout.peak(recompute) <= gpu * (1 - RESERVE)]
        if fitting:
            assert best is min(fitting, key=lambda layout: (layout.tensor * layout.pipeline, layout.pipeline))
            return
    assert best is None


@pytest.mark.parametrize("gibibytes", [16, 24, 40, 60])
@pytest.mark.parametrize("flags", ["", "--recompute", "--pipeline-model-parallel-size 2", "--micro-batch-size 8"])
def test_every_suggestion_fits_with_what_it_says(gibibytes: int, flags: str) -> None:
    gpu = gibibytes * GIB
    sentence = fit_sentence(_config(flags), _source(), 32, gpu)
    if sentence.startswith("fits"):
        return
    ways = re.findall(r"(--[^()]+) \(([\d.]+) GiB\)", sentence.split("; try ")[1])
    assert ways
    for way, needs in ways:
        found = make_layout(_config(f"{flags} {way}"), _source(), 32)
        recompute = found.config.train.recompute
        assert found.fits(gpu, recompute), way
        assert f"{found.peak(recompute) / GIB:.1f}" == needs


def test_sentence_of_what_does_not_fit() -> None:
    sentence = fit_sentence(_config("--prune-align 0"), _source(), 8, 40 * GIB)
    assert re.match(
        r"does not fit 40 GiB: stage 0 needs 79.1 of 36.0 usable GiB \(weights 12.6, gradients 37.7, fp32 masters 3.1, "
        r"moments 6.3, activations 19.5\); try --tensor-model-parallel-size 4 \(",
        sentence,
    ), sentence


def test_a_compaction_may_be_what_does_not_fit() -> None:
    flags = "--recompute --tensor-model-parallel-size 8"
    source, memory = _source(), 22 * GIB
    assert fit_sentence(_config(f"{flags} --prune-align 0"), source, 8, memory).startswith("fits 22 GiB")
    sentence = fit_sentence(_config(flags), source, 8, memory)
    assert sentence.startswith("does not fit 22 GiB")
    assert (
        "needs 25.6 of 19.8 usable GiB while tensors are cut (weights 1.6, gradients 4.7, fp32 masters old and new 6.3"
        in sentence
    )


def test_nothing_fits() -> None:
    sentence = fit_sentence(_config("--micro-batch-size 1"), _source(), 1, 8 * GIB)
    assert sentence.endswith("no layout of 1 GPU(s) fits at --micro-batch-size 1: use more or larger GPUs")
    layouts = all_layouts(_config(), _source(), 1)
    assert recommended(layouts, 8 * GIB) is None
    last = format_layouts(layouts, 8 * GIB).splitlines()[-1]
    needs = layouts[0].peak(recompute=True) / (1 - RESERVE) / GIB
    assert last == (
        f"no layout fits: the least, TP 1 x PP 1 with --recompute, needs GPUs of {needs:.1f} GiB; "
        "use a --micro-batch-size below 2, more GPUs or larger ones."
    )
    one = format_layouts(all_layouts(_config("--micro-batch-size 1"), _source(), 1), 8 * GIB)
    assert one.endswith("GiB; use more GPUs or larger ones.")


def test_a_batch_that_does_not_divide_is_no_layout_to_recommend() -> None:
    layouts = all_layouts(_config(), _source(), 24)
    assert recommended(layouts, 1000 * GIB) is None
    last = format_layouts(layouts, 80 * GIB).splitlines()[-1]
    assert last.startswith("no layout can run: change --global-batch-size 512, --micro-batch-size 2 or --gpus")
    assert "batch 512 is no multiple of micro-batch 2 x DP 24" in format_layouts(layouts, 80 * GIB)
    assert fit_sentence(_config(), _source(), 24, 80 * GIB).startswith("cannot run: batch 512")


def test_a_sequence_that_does_not_divide_is_no_layout_to_recommend() -> None:
    config = _config("--seq-length 2047 --sequence-parallel")
    problems = {layout.tensor: layout.problem for layout in all_layouts(config, _source(), 32)}
    assert problems[1] == ""
    assert problems[2] == "sequence 2047 is no multiple of TP 2"


def test_table() -> None:
    layouts = all_layouts(_config(), _source(), 32)
    lines = format_layouts(layouts, 40 * GIB).split("\n\n")[0].splitlines()
    assert len(lines) == len(layouts) + 1
    (marked,) = (line for line in lines if line.endswith("<- recommended"))
    assert marked.split()[:3] == ["4", "1", "8"]
    assert "does not fit: gradients 37.7, weights 12.6" in lines[1]


def test_json_agrees_with_the_table() -> None:
    layouts = all_layouts(_config(), _source(), 32)
    rows = layouts_dict(layouts, 80 * GIB)
    assert [row["fits"] for row in rows] == [layout.fits(80 * GIB, recompute=False) for layout in layouts]
    assert rows[0]["verdict"] == "fits with --recompute"
    assert [row["recommended"] for row in rows].index(True) == 1
    assert all(row["memory"] > row["memory_recomputed"] > 0 for row in rows)


def test_the_reduction_may_be_what_counts() -> None:
    flags = "--recompute --prune-align 0 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 2"
    sentence = fit_sentence(_config(f"{flags} --sequence-parallel"), _source(), 64, 80 * GIB)
    assert "reduction of gradients 1.6)" in sentence
    assert "activations" not in sentence
