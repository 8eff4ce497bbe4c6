#!/usr/bin/env python
"""How far is the saliency reduction in torch from the least it could cost, reading weight and gradient once?

Both are measured in turn, round by round, in this process, on matrices of the shapes of o_proj and down_proj.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SECONDS_TO_MS = 1e3


def reduce_saliency(weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Row sums ``[rows]`` and column sums ``[columns]``, fp64, of abs(w * g) computed in fp32 from any float dtype."""
    score = (weight.float() * grad.float()).abs_()
    return score.sum(1, dtype=torch.float64), score.sum(0, dtype=torch.float64)


def read_once(weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The floor: every element of both is read once (as integers, so that no dtype is slower to add than another)."""
    return weight.view(-1).view(torch.int64).max(), grad.view(-1).view(torch.int64).max()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print one line per dtype and matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048, help="rows of both matrices (default %(default)s)")
    parser.add_argument("--ffn", type=int, default=8192, help="columns of down_proj (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each (default %(default)s)")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, median of {options.rounds} rounds")
    print(f"{'matrix':<10} {'dtype':<9} {'reduction ms':>13} {'floor ms':>9} {'ratio':>6}  (quartiles of the ratio)")
    for name, columns in (("o_proj", options.hidden), ("down_proj", options.ffn)):
        for dtype in (torch.float32, torch.bfloat16):
            print(_line(name, dtype, (options.hidden, columns), options.rounds, device), flush=True)
    return 0


def _line(name: str, dtype: torch.dtype, shape: tuple[int, int], rounds: int, device: torch.device) -> str:
    weight, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    pair = (reduce_saliency, read_once)
    measured = [[_seconds(function, weight, grad) for function in pair] for _ in range(rounds + 1)]
    measured = measured[1:]  # the first round pays for allocation
    reduction, floor = (statistics.median(column) for column in zip(*measured, strict=True))
    ratios = [ours / least for ours, least in measured]
    low, middle, high = statistics.quantiles(ratios, n=4)
    times = f"{reduction * SECONDS_TO_MS:>13.2f} {floor * SECONDS_TO_MS:>9.2f}"
    return f"{name:<10} {str(dtype).removeprefix('torch.'):<9} {times} {middle:>6.1f}  ({low:.1f} .. {high:.1f})"


def _seconds(function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], weight: Tensor, grad: Tensor) -> float:
    if weight.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    function(weight, grad)
    if weight.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
