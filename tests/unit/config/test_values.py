"""Counts, ratios and shapes written as text."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.config import PruneConfig, TargetShape, floor_shape, parse_count, parse_ratio, parse_shape
from megatron_prune.config.targets import shape_between
from megatron_prune.config.values import parse_source_shape, source_shape_differences
from megatron_prune.errors import UserError

SMOLLM_360M = "hidden=960,ffn=2560,heads=15,kv_heads=5,head_dim=64,layers=32,vocab=49152,tied=1"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("457M", 457_000_000),
        ("1.1B", 1_100_000_000),  # through floats this is 1100000000.0000002 in some orders of operation
        ("0.457b", 457_000_000),
        (" 2k ", 2_000),
        ("1.5T", 1_500_000_000_000),
        ("7", 7),
    ],
)
def test_count(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "457Q", "-4M", "1e6", "4 5M", "0", "0.1", "1,1B"])
def test_bad_count(text: str) -> None:
    with pytest.raises(UserError, match="is not a count"):
        parse_count(text)


@pytest.mark.parametrize(("text", "ratio"), [("1:9", (1, 9)), ("4:1", (4, 1)), (" 2:3 ", (2, 3))])
def test_ratio(text: str, ratio: tuple[int, int]) -> None:
    assert parse_ratio(text) == ratio


@pytest.mark.parametrize("text", ["69", "1:0", "0:1", "1:9:1", "1.5:1", "a:b", ""])
def test_bad_ratio(text: str) -> None:
    with pytest.raises(UserError, match="is not a ratio"):
        parse_ratio(text)


def test_shape() -> None:
    assert parse_shape("hidden=1195, ffn=3006 ,heads=19") == TargetShape(1195, 3006, 19)
    assert parse_shape("ffn=3006") == TargetShape(None, 3006, None)
    assert parse_shape("ffn=3006").resolve(parse_source_shape(SMOLLM_360M)) == (960, 3006, 15)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hiden=3", "did you mean hidden"),
        ("hidden=3,hidden=4", "given twice"),
        ("hidden=0", "must be at least 1"),
        ("hidden=-3", "is not KEY=NUMBER"),
        ("hidden", "is not KEY=NUMBER"),
        ("", "is not KEY=NUMBER"),
        ("layers=3", "use hidden, ffn, heads"),
    ],
)
def test_bad_shape(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_shape(text)


def test_an_odd_head_has_no_rotary_positions() -> None:
    with pytest.raises(UserError, match="give an even head_dim"):
        parse_source_shape("hidden=15,ffn=8,heads=3,layers=1,vocab=9")


def test_source_shape_of_a_qwen() -> None:
    arch = parse_source_shape("hidden=3584,ffn=18944,heads=28,kv_heads=4,layers=28,vocab=152064,qkv_bias=1")
    assert (arch.family, arch.head_dim, arch.num_query_groups, arch.tie_embeddings) == ("qwen2", 128, 4, False)
    assert arch.num_parameters() == 7_615_616_512  # the count its publisher's weights have


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden=64,heads=2", "lacks ffn, layers, vocab"),
        ("hidden=64,ffn=9,heads=3,layers=1,vocab=9", "so give head_dim too"),
        ("hidden=64,ffn=9,heads=4,kv_heads=3,layers=1,vocab=9", "do not divide into 3 kv_heads"),
        ("hidden=64,ffn=9,heads=4,layers=1,vocab=9,tied=2", "is a switch"),
        ("hidden=64,ffn=9,heads=4,layers=0,vocab=9", "must be at least 1"),
    ],
)
def test_bad_source_shape(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_source_shape(text)


def test_differences_name_what_differs() -> None:
    one = parse_source_shape(SMOLLM_360M)
    other = parse_source_shape(SMOLLM_360M.replace("layers=32", "layers=30").replace("tied=1", "tied=0"))
    assert source_shape_differences(one, one) == []
    assert source_shape_differences(one, other) == ["layers 32, source 30", "tied 1, source 0"]


def test_floors() -> None:
    arch = parse_source_shape(SMOLLM_360M)
    assert floor_shape(PruneConfig(target_params="134M"), arch) == (64, 64, 1)
    assert floor_shape(PruneConfig(target_params="134M", prune_align=0), arch) == (1, 1, 1)
    assert floor_shape(PruneConfig(target_params="134M", prune_align=4096), arch) == (960, 2560, 1)
    assert floor_shape(PruneConfig(target_params="134M", prune_axes=("ffn",)), arch) == (960, 64, 15)
    assert floor_shape(PruneConfig(target_shape="hidden=10,heads=3"), arch) == (10, 2560, 3)


@given(heads=st.integers(1, 15))
def test_narrowed_kv_heads_are_possible(heads: int) -> None:
    """No layer has more KV heads than it could keep, or fewer than its queries need."""
    source = parse_source_shape(SMOLLM_360M)
    arch = shape_between(source, 757, 966, heads)
    for groups in arch.kv_groups:
        assert sum(groups) == heads
        assert len(groups) <= 5
        assert max(groups) <= 3


def test_expected_kv_heads_against_simulation() -> None:
    """5 of 15 queries, 5 KV heads: 3.68 KV heads a layer on average, near the 3.6 of the paper's Figure 9."""
    arch = shape_between(parse_source_shape(SMOLLM_360M), 757, 966, 5)
    mean = sum(map(len, arch.kv_groups)) / arch.num_layers
    kept = [len({head // 3 for head in chosen}) for chosen in combinations(range(15), 5)]
    assert abs(mean - sum(kept) / len(kept)) < 0.5 / arch.num_layers
