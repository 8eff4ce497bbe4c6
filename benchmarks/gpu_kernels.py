#!/usr/bin/env python
"""How near is each CUDA kernel to the bandwidth of the device, and how far is PyTorch?

Every kernel of csrc runs on all layers of a model in one call, as a decision does. In turn with it: the floor, which
adds up as many bytes as the kernel reads and writes; eager PyTorch, computing in fp32; the same under torch.compile.
GB/s counts the bytes that must move, once each. Needs an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence

import torch
from timing import (
    EXIT_UNAVAILABLE,
    SECONDS_TO_MS,
    Cell,
    Spread,
    add_common_options,
    describe_machine,
    measure,
    positive_int,
    print_table,
    synchronizer,
    write_json,
)
from torch import Tensor

from megatron_prune.ops.saliency import Kind, Piece, Saliency, load_csrc

#: Name on the command line -> dtypes of weight and gradient.
PAIRS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32+bf16": (torch.float32, torch.bfloat16),
}
COLUMNS = (
    "kernel",
    "dtypes",
    "kernel ms",
    "kernel GB/s",
    "floor GB/s",
    "kernel/floor",
    "eager/kernel",
    "compile/kernel",
)

#: Of one layer: weight, gradient and fp32 Hessian diagonal, ``[rows, columns]``.
Layer = tuple[Tensor, Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One kernel and what PyTorch would do for it.

    Attributes:
        kernel: on all layers at once.
        eager: the same of one layer.
        num_bytes: that must move for one layer, written ones included.
    """

    kernel: Callable[[Saliency, Sequence[Layer]], object]
    eager: Callable[[Tensor, Tensor, Tensor], object]
    num_bytes: Callable[[Layer], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print one line per kernel and dtypes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive_int, default=2048, help="of a matrix (default %(default)s)")
    parser.add_argument("--columns", type=positive_int, default=8192, help="of a matrix (default %(default)s)")
    parser.add_argument("--layers", type=positive_int, default=24, help="matrices in a call (default %(default)s)")
    add_common_options(parser, rounds=31)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"{parser.prog} needs an NVIDIA GPU and there is none here; benchmarks/kernels.py measures the CPU")
        return EXIT_UNAVAILABLE
    try:
        kernels = load_csrc("cuda")
    except ImportError as error:
        print(f"{parser.prog}: {error}")
        return EXIT_UNAVAILABLE
    shape = (options.rows, options.columns)
    print(f"{describe_machine()}; {options.layers} matrices of {shape[0]}x{shape[1]}, {options.rounds} rounds")
    rows = measure_all(kernels, shape, options.layers, options.rounds, torch.device("cuda"))
    print_table(COLUMNS, rows)
    write_json(options.json, "gpu_kernels", COLUMNS, rows)
    return 0


def measure_all(
    kernels: Saliency, shape: tuple[int, int], num_layers: int, rounds: int, device: torch.device
) -> list[list[Cell | Spread]]:
    """The rows of the table.

    Args:
        kernels: to measure.
        shape: of a matrix.
        num_layers: matrices in a call.
        rounds: measurements of each.
        device: of the matrices.
    """
    rows = []
    for dtypes, (weight_dtype, grad_dtype) in PAIRS.items():
        layers = [
            (
                torch.randn(shape, device=device).to(weight_dtype),
                torch.randn(shape, device=device).to(grad_dtype),
                torch.rand(shape, device=device),
            )
            for _ in range(num_layers)
        ]
        for name, operation in operations().items():
            rows.append([name, dtypes, *_measure(operation, kernels, layers, rounds, device)])
        del layers  # before the next dtypes' take their place
    return rows


def _measure(
    operation: Operation, kernels: Saliency, layers: Sequence[Layer], rounds: int, device: torch.device
) -> list[Cell | Spread]:
    num_bytes = sum(operation.num_bytes(layer) for layer in layers)
    floor = torch.zeros(num_bytes // torch.float32.itemsize, device=device)
    torch.compiler.reset()
    compiled = torch.compile(operation.eager, dynamic=False)
    found = measure(
        {
            "kernel": functools.partial(operation.kernel, kernels, layers),
            "floor": floor.sum,
            "eager": functools.partial(_each, operation.eager, layers),
            "compile": functools.partial(_each, compiled, layers),
        },
        rounds,
        warmup=3,
        synchronize=synchronizer(device),
    )
    ms = found.median_ms("kernel")
    speeds = (num_bytes / found.median_ms(name) * SECONDS_TO_MS / 1e9 for name in ("kernel", "floor"))
    ratios = (("kernel", "floor"), ("eager", "kernel"), ("compile", "kernel"))
    return [ms, *speeds, *(found.ratio(*pair) for pair in ratios)]


def _each(function: Callable[[Tensor, Tensor, Tensor], object], layers: Sequence[Layer]) -> None:
    for layer in layers:
        function(*layer)


# -- what is measured ------------------------------------------------------------------------------------------------


def operations() -> dict[str, Operation]:
    """Every kernel by name."""
    return {
        "taylor": Operation(functools.partial(_score, Kind.TAYLOR), _taylor, _bytes_of_weight_and_grad),
        "diag-hessian": Operation(
            functools.partial(_score, Kind.DIAG_HESSIAN), _diagonal, _bytes_of_weight_and_hessian
        ),
        "taylor-mixed": Operation(functools.partial(_score, Kind.TAYLOR_MIXED), _mixed, _bytes_of_all),
        "signed": Operation(functools.partial(_score, Kind.SIGNED), _signed, _bytes_of_weight_and_grad),
        "magnitude": Operation(functools.partial(_score, Kind.MAGNITUDE), _magnitude, _bytes_of_weight),
        "wanda": Operation(_wanda_kernel, _wanda, _bytes_of_weight),
        "square-add": Operation(_square_add_kernel, _square_add, _bytes_of_square_add),
        "column-squares": Operation(_column_squares_kernel, _column_squares, _bytes_of_weight),
    }


def _score(kind: Kind, kernels: Saliency, layers: Sequence[Layer]) -> object:
    return kernels.row_and_column_sums(_pieces(layers), kind)


def _wanda_kernel(kernels: Saliency, layers: Sequence[Layer]) -> object:
    return kernels.wanda_sums(_pieces(layers), [hessian[0] for _, _, hessian in layers])


def _square_add_kernel(kernels: Saliency, layers: Sequence[Layer]) -> object:
    return kernels.square_add_([grad for _, grad, _ in layers], [hessian for _, _, hessian in layers])


def _column_squares_kernel(kernels: Saliency, layers: Sequence[Layer]) -> object:
    totals = [torch.zeros(w.shape[1], dtype=torch.float64, device=w.device) for w, _, _ in layers]
    return kernels.column_square_sums_([weight for weight, _, _ in layers], totals)


def _pieces(layers: Sequence[Layer]) -> list[Piece]:
    return [Piece(w.view(-1), g.view(-1), h.view(-1), 0, w.shape[1]) for w, g, h in layers]


def _both_sums(score: Tensor) -> tuple[Tensor, Tensor]:
    return score.sum(1), score.sum(0)


def _taylor(weight: Tensor, grad: Tensor, hessian: Tensor) -> object:
    return _both_sums((weight.float() * grad.float()).abs_())


def _diagonal(weight: Tensor, grad: Tensor, hessian: Tensor) -> object:
    return _both_sums(weight.float().square().mul_(0.5).mul_(hessian))


def _mixed(weight: Tensor, grad: Tensor, hessian: Tensor) -> object:
    wide = weight.float()
    return _both_sums((0.5 * wide * hessian).sub_(grad).mul_(wide).abs_())


def _signed(weight: Tensor, grad: Tensor, hessian: Tensor) -> object:
    return _both_sums(weight.float() * grad.float())


def _magnitude(weight: Tensor, grad: Tensor, hessian: Tensor) -> object:
    return _both_sums(weight.float().abs())


def _wanda(weight: Tensor, grad: Tensor, hessian: Tensor) -> object:
    return _both_sums(weight.float().abs() * hessian[0])


def _square_add(weight: Tensor, grad: Tensor, hessian: Tensor) -> object:
    wide = grad.float()
    return hessian.addcmul_(wide, wide)


def _column_squares(weight: Tensor, grad: Tensor, hessian: Tensor) -> object:
    return weight.float().square().sum(0)


def _bytes_of_weight(layer: Layer) -> int:
    return layer[0].nbytes


def _bytes_of_weight_and_grad(layer: Layer) -> int:
    return layer[0].nbytes + layer[1].nbytes


def _bytes_of_weight_and_hessian(layer: Layer) -> int:
    return layer[0].nbytes + layer[2].nbytes


def _bytes_of_all(layer: Layer) -> int:
    return sum(operand.nbytes for operand in layer)


def _bytes_of_square_add(layer: Layer) -> int:
    return layer[1].nbytes + 2 * layer[2].nbytes


if __name__ == "__main__":
    sys.exit(main())
