from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prune.data.blend import GlobalOrder, TokenBlend, _floor_sum, parse_data_path
from megatron_prune.data.indexed import IndexedDatasetWriter
from megatron_prune.errors import UserError

SEQ_LENGTH = 8
VOCAB_SIZE = 1000
Maker = Callable[[str, int, int], str]

weights_lists = st.lists(st.floats(0.01, 1000), min_size=1, max_size=6)


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """Writes a dataset of ``length`` tokens, all in ``[base, base + 100)``, and returns its prefix."""

    def write(name: str, length: int, base: int) -> str:
        prefix = str(tmp_path / name)
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            writer.add_document(base + np.arange(length) % 100)
            writer.finalize()
        return prefix

    return write


@given(
    count=st.integers(0, 60),
    step=st.integers(0, 300),
    offset=st.integers(0, 300),
    modulus=st.integers(1, 100),
)
def test_floor_sum_against_the_sum(count: int, step: int, offset: int, modulus: int) -> None:
    assert _floor_sum(count, step, offset, modulus) == sum((step * k + offset) // modulus for k in range(count))


class TestGlobalOrder:
    @settings(max_examples=40)
    @given(weights=weights_lists, seed=st.integers(0, 2**40))
    def test_count_counts(self, weights: list[float], seed: int) -> None:
        order = GlobalOrder(weights, [5] * len(weights), seed)
        seen: Counter[int] = Counter()
        for n in range(200):
            assert [order.count(source, n) for source in range(len(weights))] == [seen[s] for s in range(len(weights))]
            seen[order.source(n)] += 1

    @given(weights=weights_lists, seed=st.integers(0, 2**40), n=st.integers(1, 10**18))
    def test_blend_is_in_proportion_at_any_point(self, weights: list[float], seed: int, n: int) -> None:
        order = GlobalOrder(weights, [5] * len(weights), seed)
        counts = [order.count(source, n) for source in range(len(weights))]
        assert sum(counts) == n
        for count, weight in zip(counts, weights, strict=True):
            # Independent draws would be off by sqrt(n): 10**9 at the end, where this allows 43.
            share = Fraction(weight) / sum(map(Fraction, weights))
            assert abs(count - n * share) <= 2 + math.log(n)

    @pytest.mark.parametrize("exponent", [3, 9, 12, 15, 18])
    def test_the_papers_blend_is_within_five_samples(self, exponent: int) -> None:
        weights, n = [220, 28, 4, 27.5], 10**exponent
        for seed in range(20):
            order = GlobalOrder(weights, [5] * 4, seed)
            for source, weight in enumerate(weights):
                assert abs(order.count(source, n) - n * Fraction(weight) / Fraction(sum(weights))) < 5

    @settings(max_examples=40)
    @given(weights=weights_lists, size=st.integers(1, 20), seed=st.integers(0, 2**40))
    def test_every_pass_reads_every_sample_once(self, weights: list[float], size: int, seed: int) -> None:
        order = GlobalOrder(weights, [size] * len(weights), seed)
        read: dict[int, list[int]] = {source: [] for source in range(len(weights))}
        for n in range(200):
            source, index = order.locate(n)
            read[source].append(index)
        for indices in read.values():
            whole = len(indices) // size * size
            for start in range(0, whole, size):
                assert sorted(indices[start : start + size]) == list(range(size))
            assert len(set(indices[whole:])) == len(indices[whole:])

    def test_passes_and_sources_and_seeds_are_shuffled_differently(self) -> None:
        def passes(seed: int) -> list[tuple[int, ...]]:
            order = GlobalOrder([1.0, 1.0], [40, 40], seed)
            read: dict[int, list[int]] = {0: [], 1: []}
            for n in range(200):
                source, index = order.locate(n)
                read[source].append(index)
            return [tuple(read[source][start : start + 40]) for source in (0, 1) for start in (0, 40)]

        everything = passes(0) + passes(1)
        assert len(set(everything)) == len(everything)
        assert passes(0) == passes(0)

    def test_distant_samples_are_found_directly(self) -> None:
        order = GlobalOrder([220, 28, 4, 27.5], [10**8, 10**7, 10**6, 10**7], 1)
        source, index = order.locate(10**15)
        assert 0 <= index < 10**8
        assert (source, index) == order.locate(10**15)


class TestTokenBlend:
    @pytest.fixture
    def sources(self, make: Maker) -> list[tuple[float, str]]:
        return [(3.0, make("a", 900, 0)), (1.0, make("b", 500, 200)), (0.5, make("c", 100, 400))]

    @staticmethod
    def blend(sources: list[tuple[float, str]], seed: int = 1, split: str = "8,1,1") -> TokenBlend:
        return TokenBlend(sources, SEQ_LENGTH, seed, split, "train", VOCAB_SIZE)

    def test_batches_may_be_cut_anywhere(self, sources: list[tuple[float, str]]) -> None:
        blend, again = self.blend(sources), self.blend(sources)
        whole = blend.batch(100, 8)
        assert whole.dtype == torch.int64
        assert whole.shape == (8, SEQ_LENGTH + 1)
        parts = [again.batch(106, 2), again.batch(100, 4), again.batch(104, 2)]  # in another order of reading
        assert torch.equal(torch.cat([parts[1], parts[2], parts[0]]), whole)
        assert not torch.equal(self.blend(sources, seed=2).batch(100, 8), whole)

    def test_shares_and_content(self, sources: list[tuple[float, str]]) -> None:
        rows = self.blend(sources).batch(0, 450)
        assert Counter((rows[:, 0] // 200).tolist()) == pytest.approx({0: 300, 1: 100, 2: 50}, abs=3)
        # Inside a source the tokens count up modulo 100, so each row must be a run of its source.
        assert torch.equal(rows[:, :-1] // 200, rows[:, 1:] // 200)
        assert torch.equal((rows[:, :-1] + 1) % 100, rows[:, 1:] % 100)

    def test_parts_do_not_overlap(self, tmp_path: Path) -> None:
        prefix = str(tmp_path / "unique")
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            writer.add_document(range(800))
            writer.finalize()
        seen = []
        for which, count in (("train", 74), ("valid", 12), ("test", 12)):
            blend = TokenBlend([(1.0, prefix)], SEQ_LENGTH, 0, "6,1,1", which, VOCAB_SIZE)  # type: ignore[arg-type]
            seen.append(set(blend.batch(0, count).flatten().tolist()))
        assert max(seen[0]) < 600 <= min(seen[1])
        assert max(seen[1]) < 700 <= min(seen[2])

    def test_fingerprint_tells_orders_apart(self, sources: list[tuple[float, str]], make: Maker) -> None:
        reference = self.blend(sources).fingerprint()
        assert self.blend(sources).fingerprint() == reference
        scaled = [(2 * weight, prefix) for weight, prefix in sources]
        assert self.blend(scaled).fingerprint() == reference
        moved = [(3.0, make("elsewhere", 900, 0)), *sources[1:]]
        assert self.blend(moved).fingerprint() == reference
        others = [
            self.blend(sources, seed=2),
            self.blend(sources, split="7,1,1"),
            self.blend(sources[:2]),
            self.blend([(2.0, sources[0][1]), *sources[1:]]),
            self.blend([(3.0, make("longer", 901, 0)), *sources[1:]]),
            TokenBlend(sources, SEQ_LENGTH - 1, 1, "8,1,1", "train", VOCAB_SIZE),
            TokenBlend(sources, SEQ_LENGTH, 1, "8,1,1", "valid", VOCAB_SIZE),
        ]
        assert len({reference, *(other.fingerprint() for other in others)}) == len(others) + 1

    def test_wrong_vocabulary_is_found_at_the_start(self, sources: list[tuple[float, str]]) -> None:
        with pytest.raises(UserError, match=r"wrong vocabulary for the data: \S+/c holds token 499 .* 450 tokens"):
            TokenBlend(sources, SEQ_LENGTH, 1, "1", "train", 450)
        TokenBlend(sources, SEQ_LENGTH, 1, "1", "train", 500)

    def test_wrong_vocabulary_is_found_when_read(self, tmp_path: Path) -> None:
        prefix = str(tmp_path / "late")
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            writer.add_document([1] * 5000 + [777])
            writer.finalize()
        blend = TokenBlend([(1.0, prefix)], 1000, 1, "1", "train", 700)
        with pytest.raises(UserError, match="late holds token 777"):
            blend.batch(0, 5)

    def test_negative_token(self, tmp_path: Path) -> None:
        prefix = str(tmp_path / "negative")
        with IndexedDatasetWriter(prefix, np.int32) as writer:
            writer.add_document([1] * 20 + [-2])
            writer.finalize()
        with pytest.raises(UserError, match="token -2"):
            TokenBlend([(1.0, prefix)], SEQ_LENGTH, 1, "1", "train", VOCAB_SIZE)

    def test_too_short_part(self, sources: list[tuple[float, str]]) -> None:
        with pytest.raises(UserError, match=r"c: the valid part has 1 of 100 tokens.*--split 98,1,1"):
            TokenBlend(sources[2:], SEQ_LENGTH, 1, "98,1,1", "valid", VOCAB_SIZE)

    @pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
    def test_bad_weight(self, sources: list[tuple[float, str]], weight: float) -> None:
        with pytest.raises(UserError, match="must be a positive number"):
            self.blend([(weight, sources[0][1])])


class TestParseDataPath:
    def test_pairs(self) -> None:
        assert parse_data_path(["220", "fineweb", "27.5", "owm"]) == [(220.0, "fineweb"), (27.5, "owm")]

    def test_single(self) -> None:
        assert parse_data_path(["data/x"]) == [(1.0, "data/x")]

    def test_bare_prefixes_weigh_their_tokens(self, make: Maker) -> None:
        a, b = make("a", 300, 0), make("b", 100, 0)
        assert parse_data_path([a, b]) == [(300.0, a), (100.0, b)]

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ([], "is empty"),
            (["1", "a", "b"], "'b' stands alone"),
            (["a", "1", "b", "2"], "'a' stands alone"),
            (["1", "a", "2"], "'2' stands alone"),
            (["0", "a"], "weight 0 of a"),
            (["-1", "a"], "weight -1 of a"),
            (["nan", "a"], "weight nan of a"),
            (["inf", "a"], "weight inf of a"),
        ],
    )
    def test_mistakes(self, args: list[str], message: str) -> None:
        with pytest.raises(UserError, match=message):
            parse_data_path(args)
