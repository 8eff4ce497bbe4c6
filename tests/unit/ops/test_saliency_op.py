"""Saliency sums in PyTorch, and compiled where they are built, against an oracle in fp64; what they refuse."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.ops import build_ops, saliency, saliency_torch
from megatron_prune.ops.saliency import CpuSaliency, CudaSaliency, Kind, Piece, RowAndColumnSums, Saliency, load_csrc
from megatron_prune.ops.saliency_torch import TorchSaliency

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: Mixing the two half formats is not compiled.
PAIRS = [pair for pair in ((w, g) for w in FLOATS for g in FLOATS) if set(pair) != {torch.bfloat16, torch.float16}]
RELATIVE = 1e-6


def implementations() -> list[Saliency]:
    """The version in PyTorch, and the compiled one unless this machine's install had to do without."""
    found: list[Saliency] = [TorchSaliency()]
    with contextlib.suppress(ImportError):
        found.append(load_csrc("cpu"))
    return found


@pytest.fixture(params=implementations(), ids=lambda which: type(which).__name__)
def op(request: pytest.FixtureRequest) -> Saliency:
    which: Saliency = request.param
    return which


def test_kernels_are_tested_where_they_are_required() -> None:
    """The build under MEGATRON_PRUNE_REQUIRE_EXT=1 must not end in tests of the fallback alone."""
    if os.environ.get("MEGATRON_PRUNE_REQUIRE_EXT") == "1":
        assert any(isinstance(which, CpuSaliency) for which in implementations())


def element_scores(piece: Piece, kind: Kind) -> Tensor:
    w = piece.weight.double()
    g = torch.zeros_like(w) if piece.grad is None else piece.grad.double()
    h = torch.zeros_like(w) if piece.hessian is None else piece.hessian.double()
    by_kind = {
        Kind.TAYLOR: (w * g).abs(),
        Kind.DIAG_HESSIAN: 0.5 * w**2 * h,
        Kind.TAYLOR_MIXED: (-w * g + 0.5 * w**2 * h).abs(),
        Kind.SIGNED: w * g,
        Kind.MAGNITUDE: w.abs(),
    }
    return by_kind[kind]


def oracle_sums(piece: Piece, scores: Tensor) -> RowAndColumnSums:
    """The fragment put back into its rows, the rest zero."""
    first = piece.start // piece.columns
    last = (piece.start + scores.numel() - 1) // piece.columns
    matrix = torch.zeros((last + 1 - first) * piece.columns, dtype=torch.float64)
    offset = piece.start - first * piece.columns
    matrix[offset : offset + scores.numel()] = scores
    matrix = matrix.view(-1, piece.columns)
    return matrix.sum(1), matrix.sum(0)


def assert_near(actual: RowAndColumnSums, piece: Piece, scores: Tensor) -> None:
    """Within 1e-6 of the sum of magnitudes, so that sums of both signs may cancel."""
    expected, magnitude = oracle_sums(piece, scores), oracle_sums(piece, scores.abs())
    for got, want, scale in zip(actual, expected, magnitude, strict=True):
        assert got.dtype == torch.float64
        assert got.shape == want.shape
        assert bool(((got - want).abs() <= RELATIVE * scale).all()), (got, want)


def shifted(values: Tensor, shift: int) -> Tensor:
    """The same values ``shift`` elements behind an aligned address."""
    return torch.cat([values.new_zeros(shift), values])[shift:]


def random_piece(
    numel: int,
    start: int,
    columns: int,
    pair: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    shifts: tuple[int, int, int] = (0, 0, 0),
    seed: int = 0,
) -> Piece:
    draw = torch.Generator().manual_seed(seed)
    w, g, h = (torch.randn(numel, generator=draw) for _ in range(3))
    return Piece(
        shifted(w.to(pair[0]), shifts[0]),
        shifted(g.to(pair[1]), shifts[1]),
        shifted(h.square(), shifts[2]),
        start,
        columns,
    )


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    columns = draw(st.one_of(st.integers(1, 40), st.sampled_from((127, 128, 129, 576, 2048, 4097))))
    shift = st.integers(0, 9)  # one for each operand: a missed check of alignment hides behind equal ones
    return random_piece(
        numel=draw(st.integers(1, 4 * columns + 300)),
        start=draw(st.integers(0, 3 * columns)),
        columns=columns,
        pair=draw(st.sampled_from(PAIRS)),
        shifts=(draw(shift), draw(shift), draw(shift)),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.mark.parametrize("kind", Kind)
@given(several=st.lists(pieces(), min_size=1, max_size=4))
@settings(max_examples=25)
def test_sums_are_the_oracles(kind: Kind, several: list[Piece]) -> None:
    for which in implementations():
        for piece, sums in zip(several, which.row_and_column_sums(several, kind), strict=True):
            assert_near(sums, piece, element_scores(piece, kind))


@given(several=st.lists(pieces(), min_size=1, max_size=3))
@settings(max_examples=25)
def test_wanda_sums_are_the_oracles(several: list[Piece]) -> None:
    norms = [torch.linspace(0.5, 3, piece.columns) for piece in several]
    for which in implementations():
        for piece, norm, sums in zip(several, norms, which.wanda_sums(several, norms), strict=True):
            column = torch.arange(piece.start, piece.start + piece.weight.numel()) % piece.columns
            assert_near(sums, piece, piece.weight.double().abs() * norm.double()[column])


@pytest.mark.parametrize("dtype", FLOATS)
def test_square_add(op: Saliency, dtype: torch.dtype) -> None:
    grads = [random_piece(numel, 0, 1, (dtype, dtype), seed=numel).weight for numel in (1, 37, 1000)]
    grads.append(grads[-1].view(20, 50))
    totals = [torch.full(grad.shape, 0.25) for grad in grads]
    op.square_add_(grads, totals)
    op.square_add_(grads, totals)
    for grad, total in zip(grads, totals, strict=True):
        torch.testing.assert_close(total.double(), 0.25 + 2 * grad.double() ** 2, rtol=RELATIVE, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [1, 7, 64, 513])
def test_column_square_sums_add(op: Saliency, dtype: torch.dtype, columns: int) -> None:
    inputs = [random_piece(rows * columns, 0, 1, (dtype, dtype), seed=rows).weight.view(rows, -1) for rows in (1, 130)]
    totals = [torch.full((columns,), 0.5, dtype=torch.float64) for _ in inputs]
    op.column_square_sums_(inputs, totals)
    for x, total in zip(inputs, totals, strict=True):
        torch.testing.assert_close(total, 0.5 + x.double().square().sum(0), rtol=RELATIVE, atol=0)


def test_small_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    op, piece = TorchSaliency(), random_piece(1000, 13, 30)
    grad = random_piece(100, 0, 1).weight
    x = random_piece(300, 0, 1).weight.view(60, 5)
    for elements in (1, 64, 1 << 18):
        monkeypatch.setattr(saliency_torch, "BLOCK_ELEMENTS", elements)
        assert_near(op.row_and_column_sums([piece], Kind.TAYLOR)[0], piece, element_scores(piece, Kind.TAYLOR))
        fisher, squares = torch.zeros(100), torch.zeros(5, dtype=torch.float64)
        op.square_add_([grad], [fisher])
        op.column_square_sums_([x], [squares])
        torch.testing.assert_close(fisher, grad**2)
        torch.testing.assert_close(squares, x.double().square().sum(0))


def test_pytorchs_takes_fp64() -> None:
    w, g = torch.tensor([1e-200, 2.0], dtype=torch.float64), torch.tensor([1.0, 1.0], dtype=torch.float64)
    rows, _ = TorchSaliency().row_and_column_sums([Piece(w, g, None, 0, 1)], Kind.TAYLOR)[0]
    assert rows.tolist() == [1e-200, 2.0]


@pytest.mark.parametrize("kind", Kind)
def test_any_split_adds_up_to_the_whole(op: Saliency, kind: Kind) -> None:
    whole = random_piece(40 * 33, 0, 33)
    (rows, columns), *_ = op.row_and_column_sums([whole], kind)
    cuts = [0, 1, 34, 35, 500, 1023, 40 * 33]
    assert whole.grad is not None
    assert whole.hessian is not None
    split = [
        Piece(whole.weight[a:b], whole.grad[a:b], whole.hessian[a:b], a, 33)
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    row_total, column_total = torch.zeros_like(rows), torch.zeros_like(columns)
    for piece, (some_rows, some_columns) in zip(split, op.row_and_column_sums(split, kind), strict=True):
        assert len(some_rows) == piece.num_rows
        row_total[piece.first_row : piece.first_row + piece.num_rows] += some_rows
        column_total += some_columns
    torch.testing.assert_close(row_total, rows, rtol=RELATIVE, atol=1e-5)
    torch.testing.assert_close(column_total, columns, rtol=RELATIVE, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_row_and_column_alone(op: Saliency, bad: float) -> None:
    piece = random_piece(20 * 9, 0, 9)
    assert piece.grad is not None
    piece.grad[7 * 9 + 4] = bad
    rows, columns = op.row_and_column_sums([piece], Kind.TAYLOR)[0]
    assert (~rows.isfinite()).nonzero().flatten().tolist() == [7]
    assert (~columns.isfinite()).nonzero().flatten().tolist() == [4]


def test_repeats_are_equal_bit_for_bit(op: Saliency) -> None:
    several = [random_piece(5000, start, 70, seed=start) for start in (0, 11)]
    once, twice = (op.row_and_column_sums(several, Kind.TAYLOR_MIXED) for _ in range(2))
    for first, second in zip(once, twice, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operands_a_kind_does_not_use_are_not_read(op: Saliency) -> None:
    w = torch.tensor([1.0, -2.0, 3.0])
    nothing = torch.empty(0, dtype=torch.int8)
    (rows, columns), *_ = op.row_and_column_sums([Piece(w, nothing, nothing, 0, 3)], Kind.MAGNITUDE)
    assert rows.tolist() == [6.0]
    assert columns.tolist() == [1.0, 2.0, 3.0]


def test_a_rank_that_owns_nothing_gets_nothing(op: Saliency) -> None:
    assert op.row_and_column_sums([], Kind.TAYLOR) == []
    assert op.wanda_sums([], []) == []
    op.square_add_([], [])
    op.column_square_sums_([], [])


GOOD = random_piece(12, 0, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": GOOD.weight.int()}, "the weight of piece 1 is int32, not float32 or bfloat16 or float16"),
        ({"weight": torch.ones(24)[::2]}, "the weight of piece 1 is not contiguous"),
        ({"weight": torch.ones(3, 4)}, "the weight of piece 1 has 2 dimensions, not 1"),
        ({"weight": torch.empty(0)}, "the weight of piece 1 is empty"),
        ({"grad": None}, "piece 1 has no grad, which TAYLOR_MIXED needs"),
        ({"grad": torch.ones(11)}, "the grad of piece 1 has 11 elements, not 12"),
        ({"hessian": torch.ones(12).half()}, "the hessian of piece 1 is float16, not float32"),
        ({"hessian": torch.ones(12, device="meta")}, "the hessian of piece 1 is on meta"),
        ({"start": -1}, "piece 1 starts at -1"),
        ({"columns": 0}, "piece 1 is of a matrix with 0 columns"),
    ],
)
def test_a_bad_piece_is_refused(op: Saliency, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op.row_and_column_sums([GOOD, dataclasses.replace(GOOD, **changes)], Kind.TAYLOR_MIXED)


def test_bad_lists_are_refused(op: Saliency) -> None:
    x, fisher, squares = torch.ones(3, 4), torch.zeros(12), torch.zeros(4, dtype=torch.float64)
    refused = {
        "1 grads but 0 totals": lambda: op.square_add_([x], []),
        "two of the totals are the same tensor": lambda: op.square_add_([x, x], [fisher, fisher]),
        "total 0 is float16, not float32": lambda: op.square_add_([x], [fisher.half()]),
        "total 0 has 11 elements, not 12": lambda: op.square_add_([x], [torch.zeros(11)]),
        "input 0 has 1 dimensions": lambda: op.column_square_sums_([x[0]], [squares]),
        "total 0 is float32, not float64": lambda: op.column_square_sums_([x], [squares.float()]),
        "input 0 is not contiguous": lambda: op.column_square_sums_([x.T], [torch.zeros(3, dtype=torch.float64)]),
        "1 pieces but 0 norms": lambda: op.wanda_sums([GOOD], []),
        "norms 0 has 3 elements, not 4": lambda: op.wanda_sums([GOOD], [torch.ones(3)]),
        "norms 0 is float64, not float32": lambda: op.wanda_sums([GOOD], [torch.ones(4).double()]),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_kernels_refuse_another_device() -> None:
    unused = types.ModuleType("unused")
    on_meta = dataclasses.replace(GOOD, weight=torch.empty(12, device="meta"))
    with pytest.raises(ValueError, match="the weight of piece 0 is on meta, these kernels run on cpu"):
        CpuSaliency(unused).row_and_column_sums([on_meta], Kind.MAGNITUDE)
    with pytest.raises(ValueError, match="the weight of piece 0 is on cpu, these kernels run on cuda"):
        CudaSaliency(unused).row_and_column_sums([GOOD], Kind.MAGNITUDE)


@pytest.fixture
def cuda_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """CudaSaliency over a module that only notes what it is called with."""
    calls: list[tuple[str, tuple[Any, ...]]] = []
    monkeypatch.setattr(CudaSaliency, "device_type", "cpu")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    module = types.SimpleNamespace(workspace_bytes=lambda items: 64 * len(items))
    for name in ("score", "wanda_sums", "square_add", "column_square_sums"):
        setattr(module, name, lambda *arguments, name=name: calls.append((name, arguments)))
    monkeypatch.setitem(sys.modules, "megatron_prune._C_cuda", module)
    return calls


def test_cuda_calls_carry_stream_and_workspace(cuda_on_cpu: list[tuple[str, tuple[Any, ...]]]) -> None:
    op, x, norms = load_csrc("cuda"), torch.ones(3, 4).bfloat16(), torch.ones(4)
    fisher, squares = torch.zeros(12), torch.zeros(4, dtype=torch.float64)
    ((rows, columns),) = op.row_and_column_sums([GOOD], Kind.DIAG_HESSIAN)
    ((wanda_rows, wanda_columns),) = op.wanda_sums([GOOD], [norms])
    op.square_add_([x], [fisher])
    op.column_square_sums_([x], [squares])
    score, wanda, square, column = cuda_on_cpu
    assert GOOD.hessian is not None
    pointers = (GOOD.weight.data_ptr(), 0, 0, 0, GOOD.hessian.data_ptr(), 0)
    assert score == ("score", (1, [(*pointers, 0, 12, 4, rows.data_ptr(), columns.data_ptr())], 77, score[1][3], 64))
    fragment = (pointers[0], 0, 0, 12, 4, norms.data_ptr(), wanda_rows.data_ptr(), wanda_columns.data_ptr())
    assert wanda == ("wanda_sums", ([fragment], 77, wanda[1][2], 64))
    assert square == ("square_add", ([(x.data_ptr(), 1, fisher.data_ptr(), 12)], 77))
    assert column == ("column_square_sums", ([(x.data_ptr(), 1, 3, 4, squares.data_ptr())], 77, column[1][2], 64))
    assert 0 not in (score[1][3], wanda[1][2], column[1][2])


def reason(device: torch.device) -> str:
    (choice,) = (choice for choice in build_ops({}, device).choices if choice.op == "saliency")
    assert choice.implementation == "torch"
    return choice.reason


@pytest.mark.parametrize(("device", "name"), [(CPU, "_C"), (CUDA, "_C_cuda")])
def test_a_missing_module_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: torch.device, name: str
) -> None:
    record = tmp_path / "record.json"
    monkeypatch.setitem(sys.modules, f"megatron_prune.{name}", None)
    monkeypatch.setattr(saliency, "BUILD_RECORD", record)
    assert f"megatron_prune.{name} is not built (the package was not installed here" in reason(device)
    record.write_text(json.dumps({name: "no compiler at all"}), encoding="utf-8")
    assert f"megatron_prune.{name} is not built (no compiler at all)" in reason(device)
    assert f"megatron_prune.{name} is not built (no compiler at all)" in saliency.describe_modules()
    record.write_text("{}", encoding="utf-8")
    assert f"megatron_prune.{name} is not built (built for another Python" in reason(device)
    with pytest.raises(UserError, match="saliency cannot use csrc here .*no|another"):
        build_ops({"saliency": "csrc"}, device)


def test_the_choice_can_be_forced() -> None:
    assert isinstance(build_ops({"saliency": "torch"}, CPU).saliency, TorchSaliency)


def test_modules_that_load_say_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.SimpleNamespace(info=lambda: {"simd": "avx2", "threads": 2})
    for name in ("_C", "_C_cuda"):
        monkeypatch.setitem(sys.modules, f"megatron_prune.{name}", fake)
    assert saliency.describe_modules() == [
        "megatron_prune._C loaded: simd avx2, threads 2",
        "megatron_prune._C_cuda loaded: simd avx2, threads 2",
    ]
    assert isinstance(build_ops({}, CPU).saliency, CpuSaliency)
    assert isinstance(build_ops({}, CUDA).saliency, CudaSaliency)
