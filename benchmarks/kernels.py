#!/usr/bin/env python
"""How fast is the compiled saliency kernel on the CPU: against reading its operands once, and against PyTorch?

Row and column sums of abs(w * g), computed in fp32 whatever the operands are, five ways in turn: the kernel of csrc;
the floor, which only reads the bytes of both operands (the faster of two ways, in each round); the fallback of this
package; eager PyTorch; the same under torch.compile. The last two sum in fp32, which is less work than the fp64 of the
others.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence

import torch
from timing import (
    EXIT_UNAVAILABLE,
    Cell,
    Measured,
    Spread,
    add_common_options,
    describe_machine,
    measure,
    print_table,
    write_json,
)
from torch import Tensor

from megatron_prune.ops.saliency import Kind, Piece, Saliency, load_csrc
from megatron_prune.ops.saliency_torch import TorchSaliency

#: Name on the command line -> dtypes of weight and gradient.
PAIRS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32+bf16": (torch.float32, torch.bfloat16),
}
#: Of SmolLM-1.7B o_proj and down_proj, and of a Llama-2-7B MLP.
SHAPES = ((2048, 8192), (2048, 2048), (4096, 11008))
#: What the kernel has to reach at the first of these shapes.
TARGET_SHAPE = (2048, 8192)
MOST_OF_FLOOR = 1.5
LEAST_OVER_EAGER = 4.0
LEAST_OVER_COMPILE = 1.8

COLUMNS = (
    *("matrix", "dtypes", "kernel ms", "floor ms", "kernel/floor", "target"),
    *("eager/kernel", "target", "compile/kernel", "target", "fallback/kernel"),
)
#: The same with no name twice, as JSON needs them.
JSON_COLUMNS = (
    *("matrix", "dtypes", "kernel_ms", "floor_ms", "kernel_to_floor", "floor_target"),
    *("eager_to_kernel", "eager_target", "compile_to_kernel", "compile_target", "fallback_to_kernel"),
)


def score_eagerly(weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """What one would write first: row and column sums, fp32, of abs(w * g) computed in fp32."""
    score = (weight.float() * grad.float()).abs_()
    return score.sum(1), score.sum(0)


def read_by_sum(weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Every byte of both is read once, as integers, so that no dtype is slower to add than another."""
    return weight.view(-1).view(torch.int64).sum(), grad.view(-1).view(torch.int64).sum()


def read_by_dot(weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the BLAS, the halves of each as fp32: two streams at a time are what some machines read fastest."""
    first, second = (operand.view(-1).view(torch.float32).view(2, -1) for operand in (weight, grad))
    return torch.dot(*first), torch.dot(*second)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print one line per matrix and dtypes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [f"{rows}x{columns}" for rows, columns in SHAPES]
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, help=f"matrices ({' '.join(sizes)})")
    parser.add_argument("--dtypes", nargs="+", choices=PAIRS, default=list(PAIRS), help="of weight and gradient")
    add_common_options(parser, rounds=21)
    options = parser.parse_args(argv)
    try:
        kernel = load_csrc("cpu")
    except ImportError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return EXIT_UNAVAILABLE
    print(f"{describe_machine()}; median (quartiles) of {options.rounds} rounds")
    rows = [_row(shape, name, kernel, options.rounds) for shape in options.shapes for name in options.dtypes]
    print_table(COLUMNS, rows)
    write_json(options.json, "kernels", JSON_COLUMNS, rows)
    return 0


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise argparse.ArgumentTypeError(f"{text} is not a matrix; write ROWSxCOLUMNS, e.g. 2048x8192")
    if int(rows) * int(columns) % 4:
        raise argparse.ArgumentTypeError(f"{text} has a number of elements that is no multiple of 4")
    return int(rows), int(columns)


def _row(shape: tuple[int, int], dtypes: str, kernel: Saliency, rounds: int) -> list[Cell | Spread]:
    found = _measure(shape, PAIRS[dtypes], kernel, rounds)
    floor, eager, compiled = (
        found.ratio(*names) for names in (("kernel", "floor"), ("eager", "kernel"), ("compile", "kernel"))
    )
    judged = shape == TARGET_SHAPE
    return [
        *(f"{shape[0]}x{shape[1]}", dtypes, found.median_ms("kernel"), found.median_ms("floor")),
        *(floor, _verdict("<=", MOST_OF_FLOOR, floor.median <= MOST_OF_FLOOR, judged and dtypes == "fp32")),
        *(eager, _verdict(">=", LEAST_OVER_EAGER, eager.median >= LEAST_OVER_EAGER, judged)),
        *(compiled, _verdict(">=", LEAST_OVER_COMPILE, compiled.median >= LEAST_OVER_COMPILE, judged)),
        found.ratio("fallback", "kernel"),
    ]


def _measure(
    shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], kernel: Saliency, rounds: int
) -> Measured:
    weight, grad = (torch.randn(shape).to(dtype) for dtype in dtypes)
    piece = Piece(weight.view(-1), grad.view(-1), None, 0, shape[1])
    torch.compiler.reset()  # each shape is compiled for itself, as the first one of a process would be
    compiled: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = torch.compile(score_eagerly, dynamic=False)
    found = measure(
        {
            "kernel": functools.partial(kernel.row_and_column_sums, [piece], Kind.TAYLOR),
            "read by sum": functools.partial(read_by_sum, weight, grad),
            "read by dot": functools.partial(read_by_dot, weight, grad),
            "fallback": functools.partial(TorchSaliency().row_and_column_sums, [piece], Kind.TAYLOR),
            "eager": functools.partial(score_eagerly, weight, grad),
            "compile": functools.partial(compiled, weight, grad),
        },
        rounds,
        warmup=2,
    )
    return found.with_least("floor", ("read by sum", "read by dot"))


def _verdict(sign: str, target: float, met: bool, judged: bool) -> str:
    return f"{sign} {target:g} {'met' if met else 'MISSED'}" if judged else "-"


if __name__ == "__main__":
    sys.exit(main())
