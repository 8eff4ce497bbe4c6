"""CUDA kernels on the device itself: against fp64, bit for bit on repeat, on any stream, on any device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_prune.ops.saliency import Kind, Piece, RowAndColumnSums, Saliency, load_csrc

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: Mixing the two half formats is not compiled.
PAIRS = [pair for pair in ((w, g) for w in FLOATS for g in FLOATS) if set(pair) != {torch.bfloat16, torch.float16}]
#: ``(rows, columns)``: of SmolLM-1.7B's down_proj, odd ones, one wider than a row of tiles, one row, one column.
SHAPES = ((2048, 8192), (37, 129), (130, 4097), (1, 5000), (3001, 1))
RELATIVE = 1e-6
#: Cycles that a stream sleeps: long enough for a kernel on another stream to read what is not yet written.
DELAY = 100_000_000
DEVICES = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
FIRST = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def kernels() -> Saliency:
    """The compiled module; that it is missing on a machine with a GPU is a failure."""
    return load_csrc("cuda")


def shifted(values: Tensor, shift: int) -> Tensor:
    """The same values ``shift`` elements behind an aligned address, among NaN."""
    buffer = values.new_full((shift + values.numel() + 8,), float("nan"))
    view = buffer[shift : shift + values.numel()]
    return view.copy_(values)


def random_piece(
    shape: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    start: int = 0,
    shifts: tuple[int, int, int] = (0, 0, 0),
    device: torch.device = FIRST,
) -> Piece:
    """A matrix from its element ``start`` on."""
    rows, columns = shape
    numel = rows * columns - start
    draw = torch.Generator().manual_seed(rows * columns + start)
    w, g, h = (torch.randn(numel, generator=draw).to(device) for _ in range(3))
    return Piece(
        shifted(w.to(dtypes[0]), shifts[0]),
        shifted(g.to(dtypes[1]), shifts[1]),
        shifted(h.square(), shifts[2]),
        start,
        columns,
    )


def element_scores(piece: Piece, kind: Kind) -> Tensor:
    assert piece.grad is not None
    assert piece.hessian is not None
    w, g, h = piece.weight.double(), piece.grad.double(), piece.hessian.double()
    if kind is Kind.TAYLOR:
        return (w * g).abs()
    if kind is Kind.DIAG_HESSIAN:
        return 0.5 * w * w * h
    if kind is Kind.TAYLOR_MIXED:
        return (-w * g + 0.5 * w * w * h).abs()
    return w * g if kind is Kind.SIGNED else w.abs()


def oracle(piece: Piece, scores: Tensor) -> RowAndColumnSums:
    """Sums in fp64 of the fragment put back into its rows, the rest zero."""
    skipped = piece.start % piece.columns
    matrix = scores.new_zeros(piece.num_rows * piece.columns)
    matrix[skipped : skipped + scores.numel()] = scores
    matrix = matrix.view(-1, piece.columns)
    return matrix.sum(1), matrix.sum(0)


def assert_near(actual: RowAndColumnSums, piece: Piece, scores: Tensor) -> None:
    """Within 1e-6 of the sum of magnitudes, so that sums of both signs may cancel; NaN is not near."""
    for got, want, scale in zip(actual, oracle(piece, scores), oracle(piece, scores.abs()), strict=True):
        assert got.device == piece.weight.device
        assert bool(((got - want).abs() <= RELATIVE * scale).all()), ((got - want).abs() / scale).max()


def assert_same_bits(first: list[RowAndColumnSums], second: list[RowAndColumnSums]) -> None:
    for one, other in zip(first, second, strict=True):
        for ours, theirs in zip(one, other, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("dtypes", PAIRS)
def test_scores_match_fp64(kernels: Saliency, dtypes: tuple[torch.dtype, torch.dtype], kind: Kind) -> None:
    """All shapes in one launch: whole, and cut in the middle of a row."""
    pieces = [random_piece(shape, dtypes, start) for shape in SHAPES for start in (0, shape[1] // 2)]
    for piece, sums in zip(pieces, kernels.row_and_column_sums(pieces, kind), strict=True):
        assert_near(sums, piece, element_scores(piece, kind))


@pytest.mark.parametrize("shifts", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (4, 8, 4), (3, 5, 7)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_any_operand_may_be_misaligned(kernels: Saliency, dtype: torch.dtype, shifts: tuple[int, int, int]) -> None:
    piece = random_piece((70, 256), (dtype, dtype), 8, shifts)
    (sums,) = kernels.row_and_column_sums([piece], Kind.TAYLOR_MIXED)
    assert_near(sums, piece, element_scores(piece, Kind.TAYLOR_MIXED))


def test_more_fragments_than_one_launch_takes(kernels: Saliency) -> None:
    pieces = [random_piece((5 + index % 7, 64 + index)) for index in range(200)]
    for piece, sums in zip(pieces, kernels.row_and_column_sums(pieces, Kind.TAYLOR), strict=True):
        assert_near(sums, piece, element_scores(piece, Kind.TAYLOR))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_squares_wanda_and_column_squares_match_fp64(
    kernels: Saliency, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    piece = random_piece(shape, (dtype, dtype))
    weight, grad, hessian = piece.weight, piece.grad, piece.hessian
    assert grad is not None
    assert hessian is not None
    want = hessian.double() + grad.double().square()
    kernels.square_add_([grad], [hessian])
    torch.testing.assert_close(hessian.double(), want, rtol=RELATIVE, atol=0)

    totals = torch.full((shape[1],), 3.0, dtype=torch.float64, device=FIRST)
    kernels.column_square_sums_([weight.view(shape)], [totals])
    torch.testing.assert_close(totals, 3.0 + weight.view(shape).double().square().sum(0), rtol=RELATIVE, atol=0)

    norms = torch.rand(shape[1], device=FIRST)
    (sums,) = kernels.wanda_sums([piece], [norms])
    assert_near(sums, piece, (weight.view(shape).double().abs() * norms.double()).view(-1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_reaches_its_own_sums_alone(kernels: Saliency, value: float) -> None:
    piece = random_piece((130, 4097))
    piece.weight[70 * 4097 + 11] = value
    ((rows, columns),) = kernels.row_and_column_sums([piece], Kind.TAYLOR)
    assert torch.nonzero(~rows.isfinite()).flatten().tolist() == [70]
    assert torch.nonzero(~columns.isfinite()).flatten().tolist() == [11]


@pytest.mark.parametrize("kind", Kind)
def test_repeats_give_the_same_bits(kernels: Saliency, kind: Kind) -> None:
    """Also while another stream keeps the device busy, which changes the order that blocks run in."""
    pieces = [random_piece(shape) for shape in SHAPES]
    first = kernels.row_and_column_sums(pieces, kind)
    noise = torch.randn(4096, 4096, device=FIRST)
    other = torch.cuda.Stream(FIRST)
    other.wait_stream(torch.cuda.current_stream(FIRST))
    for _ in range(20):
        with torch.cuda.stream(other):
            noise = torch.tanh(noise @ noise)
        assert_same_bits(kernels.row_and_column_sums(pieces, kind), first)
    torch.cuda.synchronize(FIRST)


def test_runs_on_the_current_stream(kernels: Saliency) -> None:
    """On another stream it would read the gradient before the sleeping stream has written it."""
    piece = random_piece((2048, 8192))
    assert piece.grad is not None
    grad = piece.grad.clone()
    piece.grad.fill_(float("nan"))
    stream = torch.cuda.Stream(FIRST)
    with torch.cuda.stream(stream):
        kernels.row_and_column_sums([piece], Kind.TAYLOR)  # loads the kernel and allocates, which may well wait
    torch.cuda.synchronize(FIRST)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(DELAY)
        piece.grad.copy_(grad)
        (sums,) = kernels.row_and_column_sums([piece], Kind.TAYLOR)
    assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    assert_near(sums, piece, element_scores(piece, Kind.TAYLOR))


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_tensors_device_need_not_be_current(kernels: Saliency, device: torch.device) -> None:
    """The first device is current throughout, the tensors are on each in turn."""
    torch.cuda.set_device(FIRST)
    piece = random_piece((513, 2048), device=device)
    (sums,) = kernels.row_and_column_sums([piece], Kind.TAYLOR)
    assert torch.cuda.current_device() == FIRST.index
    assert_near(sums, piece, element_scores(piece, Kind.TAYLOR))


def test_tensors_of_the_cpu_are_refused(kernels: Saliency) -> None:
    with pytest.raises(ValueError, match="is on cpu, these kernels run on cuda"):
        kernels.row_and_column_sums([random_piece((4, 4), device=torch.device("cpu"))], Kind.TAYLOR)
