"""CPU kernels and, under the emulation, CUDA kernels against fp64 in torch.

Operands lie at independently drawn misalignments among NaN, outputs and workspace among canaries: a read beyond a
fragment poisons its sums, a write beyond is seen.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

KINDS = {"taylor": 0, "diag-hessian": 1, "taylor-mixed": 2, "signed": 3, "magnitude": 4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(w, g) for w in DTYPES for g in DTYPES if w == g or torch.float32 in (w, g)]
RELATIVE = 1e-6
CANARY = 12345.0
PAD = 64

property_test = settings(
    max_examples=80, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


class Kernels:
    """Calls one of the modules; for CUDA with a workspace of exactly the size it asks for."""

    def __init__(self, module: ModuleType, simd: bool | None) -> None:
        self._module = module
        self._simd = simd

    def call(self, function: str, items: Sequence[tuple[int, ...]], *first: int) -> None:
        run = getattr(self._module, function)
        if self._simd is not None:
            run(*first, list(items), simd=self._simd)
        elif function == "square_add":
            run(list(items), stream=0)
        else:
            size = self._module.workspace_bytes(list(items))
            assert size % 4 == 0
            workspace = torch.full((size // 4 + PAD,), float("nan"))
            workspace[size // 4 :] = CANARY
            run(*first, list(items), stream=0, workspace_ptr=workspace.data_ptr(), workspace_bytes=size)
            assert bool((workspace[size // 4 :] == CANARY).all()), "wrote beyond the workspace"


@pytest.fixture(params=["cpu", "cpu base instruction set", "cuda emulated"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "cuda emulated":
        return Kernels(request.getfixturevalue("emulated_module"), None)
    return Kernels(request.getfixturevalue("cpu_module"), request.param == "cpu")


def code(tensor: Tensor) -> int:
    return DTYPES.index(tensor.dtype)


def misplaced(values: Tensor, offset: int) -> Tensor:
    """A copy that starts ``offset`` elements after a 64-byte boundary, surrounded by NaN."""
    buffer = torch.full((values.numel() + 2 * PAD,), float("nan"), dtype=values.dtype)
    view = buffer[PAD + offset : PAD + offset + values.numel()]
    view.copy_(values)
    return view


class Output:
    """An fp64 vector between canaries; NaN where nothing has been written."""

    def __init__(self, size: int, value: float = float("nan")) -> None:
        self._buffer = torch.full((size + 2 * PAD,), CANARY, dtype=torch.float64)
        self.values = self._buffer[PAD : PAD + size]
        self.values.fill_(value)

    @property
    def pointer(self) -> int:
        return self.values.data_ptr()

    def checked(self) -> Tensor:
        edges = torch.cat([self._buffer[:PAD], self._buffer[-PAD:]])
        assert bool((edges == CANARY).all()), "wrote beyond an output"
        return self.values


@dataclasses.dataclass
class Piece:
    """A fragment of a matrix of ``columns`` columns, with its outputs."""

    weight: Tensor
    grad: Tensor
    hess: Tensor
    start: int
    columns: int

    def __post_init__(self) -> None:
        last = self.start + self.weight.numel() - 1
        self.first_row = self.start // self.columns
        self.num_rows = last // self.columns + 1 - self.first_row if self.weight.numel() else 0
        self.rows, self.column_sums = Output(self.num_rows), Output(self.columns)

    def score_item(self) -> tuple[int, ...]:
        w, g, h = self.weight, self.grad, self.hess
        place = (self.start, w.numel(), self.columns, self.rows.pointer, self.column_sums.pointer)
        return (w.data_ptr(), code(w), g.data_ptr(), code(g), h.data_ptr(), code(h), *place)

    def wanda_item(self, norms: Tensor) -> tuple[int, ...]:
        place = (self.start, self.weight.numel(), self.columns, norms.data_ptr())
        return (self.weight.data_ptr(), code(self.weight), *place, self.rows.pointer, self.column_sums.pointer)

    def sums_of(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column sums of this fragment's element scores, in fp64."""
        index = torch.arange(self.start, self.start + scores.numel())
        rows = torch.zeros(self.num_rows, dtype=torch.float64)
        columns = torch.zeros(self.columns, dtype=torch.float64)
        rows.index_add_(0, index // self.columns - self.first_row, scores)
        columns.index_add_(0, index % self.columns, scores)
        return rows, columns

    def element_scores(self, kind: str) -> Tensor:
        w, g, h = self.weight.double(), self.grad.double(), self.hess.double()
        return {
            "taylor": (w * g).abs(),
            "diag-hessian": 0.5 * w * w * h,
            "taylor-mixed": (-w * g + 0.5 * w * w * h).abs(),
            "signed": w * g,
            "magnitude": w.abs(),
        }[kind]

    def check(self, scores: Tensor) -> None:
        """Every sum within 1e-6 of the oracle, relative to the sum of abs."""
        got = (self.rows.checked(), self.column_sums.checked())
        for sums, want, scale in zip(got, self.sums_of(scores), self.sums_of(scores.abs()), strict=True):
            worst = ((sums - want).abs() - RELATIVE * scale).max().item() if sums.numel() else 0.0
            assert worst <= 1e-40, f"off by {worst} more than allowed"  # NaN fails, too


widths = st.one_of(st.integers(1, 40), st.integers(1, 512).map(lambda n: 8 * n), st.integers(1, 4100))


@st.composite
def pieces(draw: st.DrawFn) -> list[Piece]:
    """Up to five fragments: one matrix, or a part of it, cut anywhere; each has its dtypes and misalignments."""
    columns = draw(widths)
    rows = draw(st.integers(1, min(200, 40_000 // columns + 1)))
    size = rows * columns
    multiple = draw(st.sampled_from([1, 1, 8]))  # cuts at multiples of 8 keep to the path of 16-byte loads
    cuts = draw(st.lists(st.integers(0, size // multiple).map(lambda n: n * multiple), min_size=2, max_size=6))
    cuts = [0, size] if draw(st.booleans()) and len(cuts) == 2 else sorted(cuts)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1.0, 1e-2, 1e-6]))  # the last is subnormal in fp16
    constant = draw(st.booleans())  # rounding errors of equal numbers do not cancel

    def operand(dtype: torch.dtype, numel: int, factor: float) -> Tensor:
        values = torch.randn(1 if constant else numel, generator=generator).expand(numel)
        offset = draw(st.sampled_from([0, 0, 8, 1, 2, 3, 5]))
        return misplaced((factor * values).to(dtype), offset)

    result = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        w, g = draw(st.sampled_from(PAIRS))
        weight, grad = operand(w, end - start, 1.0), operand(g, end - start, scale)
        result.append(Piece(weight, grad, operand(torch.float32, end - start, 1.0).abs_(), start, columns))
    return result


@property_test
@given(drawn=pieces(), kind=st.sampled_from(sorted(KINDS)))
def test_scores_match_fp64(kernels: Kernels, drawn: list[Piece], kind: str) -> None:
    kernels.call("score", [piece.score_item() for piece in drawn], KINDS[kind])
    for piece in drawn:
        piece.check(piece.element_scores(kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 4, 8])
def test_each_operand_may_be_misaligned_alone(kernels: Kernels, start: int, dtype: torch.dtype) -> None:
    """Columns allow 16-byte loads, so that the place of each operand alone decides; chance meets this too seldom."""
    generator = torch.Generator().manual_seed(start)
    w, g, h = (torch.rand(5 * 24 - start - 2, generator=generator) for _ in range(3))
    for offsets in itertools.product([0, 4, 5], repeat=3):
        weight, grad = misplaced(w.to(dtype), offsets[0]), misplaced(g.to(dtype), offsets[1])
        piece = Piece(weight, grad, misplaced(h, offsets[2]), start, 24)
        for kind in ("taylor", "diag-hessian", "taylor-mixed"):
            kernels.call("score", [piece.score_item()], KINDS[kind])
            piece.check(piece.element_scores(kind))


@pytest.mark.parametrize(("rows", "columns"), [(3, 50_001), (4, 50_001), (20_001, 2)])
def test_long_sums_of_equal_numbers_stay_exact(kernels: Kernels, rows: int, columns: int) -> None:
    """Where fp32 sums over the whole length would be off by more than 1e-5."""
    weight = torch.full((rows * columns,), 0.7)
    piece = Piece(weight, torch.full_like(weight, 0.3), weight, 0, columns)
    kernels.call("score", [piece.score_item()], KINDS["taylor"])
    piece.check(piece.element_scores("taylor"))


@property_test
@given(drawn=pieces(), seed=st.integers(0, 1000))
def test_wanda_matches_fp64(kernels: Kernels, drawn: list[Piece], seed: int) -> None:
    norms = misplaced(torch.rand(drawn[0].columns, generator=torch.Generator().manual_seed(seed)), seed % 8)
    kernels.call("wanda_sums", [piece.wanda_item(norms) for piece in drawn])
    for piece in drawn:
        index = torch.arange(piece.start, piece.start + piece.weight.numel()) % piece.columns
        piece.check(piece.weight.double().abs() * norms.double()[index])


@property_test
@given(drawn=pieces())
def test_column_square_sums_are_added(kernels: Kernels, drawn: list[Piece]) -> None:
    """Of a fragment, the whole rows that its elements would fill."""
    outputs, items = [Output(piece.columns, 3.0) for piece in drawn], []
    for piece, output in zip(drawn, outputs, strict=True):
        rows = piece.weight.numel() // piece.columns
        items.append((piece.weight.data_ptr(), code(piece.weight), rows, piece.columns, output.pointer))
    kernels.call("column_square_sums", items)
    for piece, output in zip(drawn, outputs, strict=True):
        rows = piece.weight.numel() // piece.columns
        x = piece.weight[: rows * piece.columns].reshape(rows, piece.columns).double()
        torch.testing.assert_close(output.checked(), 3.0 + x.square().sum(0), rtol=RELATIVE, atol=0.0)


@property_test
@given(drawn=pieces())
def test_squares_are_added(kernels: Kernels, drawn: list[Piece]) -> None:
    storages = [torch.empty(0).set_(piece.hess.untyped_storage()) for piece in drawn]
    for whole in storages:
        whole[whole.isnan()] = CANARY  # NaN would swallow what is added to it
    before = [piece.hess.double() for piece in drawn]
    items = [(p.grad.data_ptr(), code(p.grad), p.hess.data_ptr(), p.grad.numel()) for p in drawn]
    kernels.call("square_add", items)
    for piece, start, whole in zip(drawn, before, storages, strict=True):
        want = start + piece.grad.double().square()
        torch.testing.assert_close(piece.hess.double(), want, rtol=RELATIVE, atol=1e-40)
        assert int((whole == CANARY).sum()) == 2 * PAD, "wrote beyond h"


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_widened_exactly(kernels: Kernels, dtype: torch.dtype, offset: int) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    piece = Piece(misplaced(every, offset), torch.empty(0), torch.empty(0), 0, 2**16)
    kernels.call("score", [piece.score_item()], KINDS["magnitude"])
    torch.testing.assert_close(piece.column_sums.checked(), every.double().abs(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("columns", [104, 103])  # the path of 16-byte loads, and the other
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_their_own_sums_only(kernels: Kernels, kind: str, columns: int, value: float) -> None:
    def sums(poison: bool) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(5)
        flat = [torch.rand(70 * columns - 24, generator=generator) for _ in range(3)]
        if poison:
            flat[0][41 * columns + 9 - 8] = value  # row 41, column 9 of a fragment that starts at element 8
        weight, grad, hess = (misplaced(operand, 8) for operand in flat)
        piece = Piece(weight, grad, hess, 8, columns)
        kernels.call("score", [piece.score_item()], KINDS[kind])
        return piece.rows.checked(), piece.column_sums.checked()

    for poisoned, clean, index in zip(sums(True), sums(False), (41, 9), strict=True):
        assert not bool(poisoned[index].isfinite())
        others = torch.arange(len(clean)) != index
        assert torch.equal(poisoned[others], clean[others])


def test_infinite_norms_touch_their_column_only(kernels: Kernels) -> None:
    """Lanes beyond a fragment must not multiply their zeros by an infinite norm."""
    norms = torch.ones(24)
    norms[[3, 20]] = float("inf")
    piece = Piece(misplaced(torch.ones(10), 0), torch.empty(0), torch.empty(0), start=8, columns=24)
    kernels.call("wanda_sums", [piece.wanda_item(norms)])
    assert piece.rows.checked().tolist() == [10.0]
    assert piece.column_sums.checked().tolist() == [0.0] * 8 + [1.0] * 10 + [0.0] * 6


def test_signed_sums_keep_their_sign(kernels: Kernels) -> None:
    piece = Piece(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([-1.0, 1.0, -1.0, -1.0]), torch.empty(0), 0, 2)
    kernels.call("score", [piece.score_item()], KINDS["signed"])
    assert piece.rows.checked().tolist() == [1.0, -7.0]
    assert piece.column_sums.checked().tolist() == [-4.0, -2.0]


def test_mixed_terms_cancel_without_loss(kernels: Kernels) -> None:
    """g equal to w H / 2 but for its last bit: the difference is all that is left."""
    hess = torch.linspace(0.5, 2.0, 64 * 48)
    weight = torch.linspace(0.3, 1.7, 64 * 48)
    piece = Piece(weight, (0.5 * weight * hess).nextafter(torch.tensor(9.0)), hess, 0, 48)
    kernels.call("score", [piece.score_item()], KINDS["taylor-mixed"])
    piece.check(piece.element_scores("taylor-mixed"))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=pieces(), kind=st.sampled_from(sorted(KINDS)))
def test_bits_do_not_depend_on_threads_or_repetition(
    cpu_module: ModuleType, emulated_module: ModuleType, drawn: list[Piece], kind: str
) -> None:
    def bits(kernels: Kernels) -> list[Tensor]:
        for piece in drawn:
            piece.rows.values.fill_(float("nan"))
        kernels.call("score", [piece.score_item() for piece in drawn], KINDS[kind])
        return [out.clone() for piece in drawn for out in (piece.rows.values, piece.column_sums.values)]

    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            assert cpu_module.info()["threads"] == threads, "torch and the kernels have two OpenMP runtimes"
            runs.append(bits(Kernels(cpu_module, True)))
    finally:
        torch.set_num_threads(before)
    emulated = [bits(Kernels(emulated_module, None)) for _ in range(2)]
    for first, again in [(runs[0], run) for run in runs[1:]] + [(emulated[0], emulated[1])]:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
