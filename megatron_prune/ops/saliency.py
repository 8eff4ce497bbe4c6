"""Row and column sums of element scores, and the two sums of squares they need: the only caller of ``csrc``.

A rank scores all the fragments it owns in one call. The compiled kernels read weight and gradient once and keep no
temporaries; ``saliency_torch`` does the same arithmetic in PyTorch. Both compute in fp32 from any mix of dtypes and sum
in fp64: products of bf16 tensors in bf16 change which unit is the least.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

#: The compiled module for each type of device, and the codes that its interface gives to dtypes.
MODULES = {"cpu": "_C", "cuda": "_C_cuda"}
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: setup.py leaves word of what it built, and why not, in this file of the package.
BUILD_RECORD = "csrc_build.json"


class Kind(enum.IntEnum):
    """The element score that is summed; the numbers are those of the compiled interface."""

    #: abs(w g)
    TAYLOR = 0
    #: w^2 H / 2
    DIAG_HESSIAN = 1
    #: abs(-w g + w^2 H / 2)
    TAYLOR_MIXED = 2
    #: w g with its sign: LLM-Pruner's ``vectorize`` takes abs of the sum over a group
    SIGNED = 3
    #: abs(w)
    MAGNITUDE = 4

    @property
    def uses_grad(self) -> bool:
        """True if a piece must have its gradient."""
        return self in (Kind.TAYLOR, Kind.TAYLOR_MIXED, Kind.SIGNED)

    @property
    def uses_hessian(self) -> bool:
        """True if a piece must have its Hessian diagonal."""
        return self in (Kind.DIAG_HESSIAN, Kind.TAYLOR_MIXED)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A contiguous run of the elements of one matrix, as an optimizer shard holds it.

    Attributes:
        weight: ``[numel]``, contiguous, fp32, bf16 or fp16.
        grad: the same of the gradient, in any of those dtypes; not read where the kind has no use for it.
        hessian: the same of the Hessian's diagonal, fp32.
        start: position of the first element in the flattened matrix.
        columns: of the matrix.
    """

    weight: Tensor
    grad: Tensor | None
    hessian: Tensor | None
    start: int
    columns: int

    @property
    def first_row(self) -> int:
        """The row of the matrix that the first of this piece's row sums belongs to."""
        return self.start // self.columns

    @property
    def num_rows(self) -> int:
        """How many rows of the matrix the piece touches, a part of one included."""
        return -(-(self.start + self.weight.numel()) // self.columns) - self.first_row


#: Sums of one piece: rows ``[num_rows]``, the first of them ``first_row`` of the matrix, and ``[columns]``; both fp64.
RowAndColumnSums = tuple[Tensor, Tensor]
#: What the compiled functions take: pointers, dtype codes and sizes of each operand.
Items = Sequence[tuple[int, ...]]


class Saliency(abc.ABC):
    """The operations. Every tensor of a call is on one device; results stay there, and CUDA does not synchronise.

    All raise ValueError for what an implementation cannot read correctly: another device or dtype, a view with gaps,
    lengths that do not agree.
    """

    #: What weights, gradients and inputs may be, and what Hessian diagonals may be.
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPE_CODES)
    hessian_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    #: The type of device an implementation is for, None for any.
    device_type: str | None = None

    @torch.no_grad()
    def row_and_column_sums(self, pieces: Sequence[Piece], kind: Kind) -> list[RowAndColumnSums]:
        """Sums of element scores of all pieces, e.g. of all layers at once.

        Args:
            pieces: at most one of each matrix is the usual case, but they are independent of each other.
            kind: the score.

        Returns:
            For each piece its row and column sums; columns that it does not reach are zero. NaN and inf propagate.
        """
        for index, piece in enumerate(pieces):
            self._check_piece(f"piece {index}", piece, kind)
        _check_one_device([piece.weight for piece in pieces])
        sums = _new_sums(pieces)
        if pieces:
            self._score(pieces, kind, sums)
        return sums

    @torch.no_grad()
    def square_add_(self, grads: Sequence[Tensor], totals: Sequence[Tensor]) -> None:
        """``total += grad ** 2``, the empirical Fisher diagonal.

        Args:
            grads: contiguous, of any shape.
            totals: contiguous fp32, as many elements as the gradient; changed in place.
        """
        _check_pairs("grads", grads, "totals", totals)
        for index, (grad, total) in enumerate(zip(grads, totals, strict=True)):
            self._check_tensor(f"grad {index}", grad)
            self._check_tensor(f"total {index}", total, (torch.float32,), grad.numel())
        _check_one_device([*grads, *totals])
        if grads:
            self._square_add(grads, totals)

    @torch.no_grad()
    def column_square_sums_(self, inputs: Sequence[Tensor], totals: Sequence[Tensor]) -> None:
        """``total[j] += sum_i x[i, j] ** 2``, from which Wanda's norms of a layer's input channels are made.

        Args:
            inputs: ``[tokens, columns]``, contiguous.
            totals: ``[columns]`` fp64; changed in place.
        """
        _check_pairs("inputs", inputs, "totals", totals)
        for index, (x, total) in enumerate(zip(inputs, totals, strict=True)):
            if x.dim() != 2:
                raise ValueError(f"input {index} has {x.dim()} dimensions, not [tokens, columns]")
            self._check_tensor(f"input {index}", x)
            self._check_tensor(f"total {index}", total, (torch.float64,), x.shape[1])
        _check_one_device([*inputs, *totals])
        if inputs:
            self._column_square_sums(inputs, totals)

    @torch.no_grad()
    def wanda_sums(self, pieces: Sequence[Piece], norms: Sequence[Tensor]) -> list[RowAndColumnSums]:
        """:meth:`row_and_column_sums` of ``abs(w_ij) * norms_j``.

        Args:
            pieces: only their weights are read.
            norms: for each piece ``[columns]`` fp32 contiguous, the norms of the layer's input channels.
        """
        if len(pieces) != len(norms):
            raise ValueError(f"{len(pieces)} pieces but {len(norms)} norms")
        for index, (piece, norm) in enumerate(zip(pieces, norms, strict=True)):
            self._check_piece(f"piece {index}", piece, Kind.MAGNITUDE)
            self._check_tensor(f"norms {index}", norm, (torch.float32,), piece.columns)
        _check_one_device([*(piece.weight for piece in pieces), *norms])
        sums = _new_sums(pieces)
        if pieces:
            self._wanda(pieces, norms, sums)
        return sums

    @abc.abstractmethod
    def _score(self, pieces: Sequence[Piece], kind: Kind, sums: Sequence[RowAndColumnSums]) -> None: ...

    @abc.abstractmethod
    def _square_add(self, grads: Sequence[Tensor], totals: Sequence[Tensor]) -> None: ...

    @abc.abstractmethod
    def _column_square_sums(self, inputs: Sequence[Tensor], totals: Sequence[Tensor]) -> None: ...

    @abc.abstractmethod
    def _wanda(self, pieces: Sequence[Piece], norms: Sequence[Tensor], sums: Sequence[RowAndColumnSums]) -> None: ...

    def _check_tensor(
        self, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] | None = None, numel: int | None = None
    ) -> None:
        allowed = self.dtypes if dtypes is None else dtypes
        if self.device_type not in (None, tensor.device.type):
            raise ValueError(f"{name} is on {tensor.device}, these kernels run on {self.device_type}")
        if tensor.dtype not in allowed:
            raise ValueError(f"{name} is {_short(tensor.dtype)}, not {' or '.join(map(_short, allowed))}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: shape {list(tensor.shape)}, strides {list(tensor.stride())}")
        if tensor.numel() == 0:
            raise ValueError(f"{name} is empty")
        if numel is not None and tensor.numel() != numel:
            raise ValueError(f"{name} has {tensor.numel()} elements, not {numel}")

    def _check_piece(self, name: str, piece: Piece, kind: Kind) -> None:
        if piece.start < 0:
            raise ValueError(f"{name} starts at {piece.start}, before its matrix")
        if piece.columns < 1:
            raise ValueError(f"{name} is of a matrix with {piece.columns} columns")
        operands: list[tuple[str, Tensor | None, tuple[torch.dtype, ...]]] = [("weight", piece.weight, self.dtypes)]
        operands += [("grad", piece.grad, self.dtypes)] if kind.uses_grad else []
        operands += [("hessian", piece.hessian, self.hessian_dtypes)] if kind.uses_hessian else []
        for role, tensor, dtypes in operands:
            if tensor is None:
                raise ValueError(f"{name} has no {role}, which {kind.name} needs")
            if tensor.dim() != 1:
                raise ValueError(f"the {role} of {name} has {tensor.dim()} dimensions, not 1")
            self._check_tensor(f"the {role} of {name}", tensor, dtypes, piece.weight.numel())
            if tensor.device != piece.weight.device:
                raise ValueError(f"the {role} of {name} is on {tensor.device}, its weight on {piece.weight.device}")


class CpuSaliency(Saliency):
    """The compiled kernels for the CPU.

    Args:
        module: ``megatron_prune._C``.
    """

    device_type = "cpu"

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def _score(self, pieces: Sequence[Piece], kind: Kind, sums: Sequence[RowAndColumnSums]) -> None:
        fragments = [
            (
                *_operand(piece.weight),
                *_operand(piece.grad if kind.uses_grad else None),
                *_operand(piece.hessian if kind.uses_hessian else None),
                *(piece.start, piece.weight.numel(), piece.columns, rows.data_ptr(), columns.data_ptr()),
            )
            for piece, (rows, columns) in zip(pieces, sums, strict=True)
        ]
        self._launch(pieces[0].weight.device, functools.partial(self._module.score, int(kind)), fragments)

    def _square_add(self, grads: Sequence[Tensor], totals: Sequence[Tensor]) -> None:
        pairs = zip(grads, totals, strict=True)
        items = [(*_operand(grad), total.data_ptr(), grad.numel()) for grad, total in pairs]
        self._launch(grads[0].device, self._module.square_add, items, needs_workspace=False)

    def _column_square_sums(self, inputs: Sequence[Tensor], totals: Sequence[Tensor]) -> None:
        pairs = zip(inputs, totals, strict=True)
        items = [(*_operand(x), x.shape[0], x.shape[1], total.data_ptr()) for x, total in pairs]
        self._launch(inputs[0].device, self._module.column_square_sums, items)

    def _wanda(self, pieces: Sequence[Piece], norms: Sequence[Tensor], sums: Sequence[RowAndColumnSums]) -> None:
        fragments = [
            (
                *_operand(piece.weight),
                *(piece.start, piece.weight.numel(), piece.columns, norm.data_ptr()),
                *(rows.data_ptr(), columns.data_ptr()),
            )
            for piece, norm, (rows, columns) in zip(pieces, norms, sums, strict=True)
        ]
        self._launch(pieces[0].weight.device, self._module.wanda_sums, fragments)

    def _launch(
        self, device: torch.device, kernel: Callable[..., None], items: Items, needs_workspace: bool = True
    ) -> None:
        del device, needs_workspace  # of CUDA
        kernel(items)


class CudaSaliency(CpuSaliency):
    """The compiled kernels for CUDA, on the current stream of the tensors' device.

    Args:
        module: ``megatron_prune._C_cuda``.
    """

    device_type = "cuda"

    def _launch(
        self, device: torch.device, kernel: Callable[..., None], items: Items, needs_workspace: bool = True
    ) -> None:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            if not needs_workspace:
                kernel(items, stream)
                return
            size: int = self._module.workspace_bytes(items)
            # Freed when this returns; PyTorch then gives the memory to nobody before this stream is done with it.
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
            kernel(items, stream, workspace.data_ptr(), size)


def load_csrc(device_type: str) -> Saliency:
    """The compiled kernels for a type of device, ``cpu`` or ``cuda``.

    Raises:
        ImportError: not built (the message says why, as far as setup.py left word), or built for another Python.
    """
    module = _import_module(MODULES[device_type])
    return CudaSaliency(module) if device_type == "cuda" else CpuSaliency(module)


def describe_modules() -> list[str]:
    """One line for each compiled module: loaded, with what it says of itself, or why not."""
    lines = []
    for name in MODULES.values():
        try:
            facts: dict[str, Any] = _import_module(name).info()
        # What a module built for another machine raises is of no use here but to be told.
        except (ImportError, OSError, RuntimeError) as error:
            lines.append(f"{error}")
            continue
        lines.append(f"megatron_prune.{name} loaded: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    return lines


def _import_module(name: str) -> ModuleType:
    """Import a compiled module; this file has imported torch, so the two share one OpenMP runtime."""
    full_name = f"megatron_prune.{name}"
    try:
        return importlib.import_module(full_name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{full_name} is not built ({_why_not_built(name)})") from error


def _why_not_built(name: str) -> str:
    record = Path(__file__).parents[1] / BUILD_RECORD
    if not record.exists():
        return "the package was not installed here: pip install ."
    reasons: dict[str, str] = json.loads(record.read_text(encoding="utf-8"))
    return reasons.get(name, "built for another Python: install again")


def _check_one_device(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if tensor.device != tensors[0].device:
            raise ValueError(f"tensors of one call are on {tensors[0].device} and on {tensor.device}")


def _check_pairs(name: str, tensors: Sequence[Tensor], total_name: str, totals: Sequence[Tensor]) -> None:
    if len(tensors) != len(totals):
        raise ValueError(f"{len(tensors)} {name} but {len(totals)} {total_name}")
    # One launch adds all of them at once, in no order: two that share a total would lose each other's share.
    if len({total.data_ptr() for total in totals}) != len(totals):
        raise ValueError(f"two of the {total_name} are the same tensor")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _new_sums(pieces: Sequence[Piece]) -> list[RowAndColumnSums]:
    """Uninitialised outputs, all in one allocation."""
    if not pieces:
        return []
    sizes = [size for piece in pieces for size in (piece.num_rows, piece.columns)]
    vectors = torch.empty(sum(sizes), dtype=torch.float64, device=pieces[0].weight.device).split(sizes)
    return list(zip(vectors[::2], vectors[1::2], strict=True))


def _operand(tensor: Tensor | None) -> tuple[int, int]:
    """Pointer and dtype code; 0 and 0 for nothing."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), DTYPE_CODES[tensor.dtype])
