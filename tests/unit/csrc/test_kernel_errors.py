"""What the compiled interface refuses, the same in both modules, before it reads or writes anything."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

FIELDS = (
    *("weight", "weight_dtype", "grad", "grad_dtype", "hess", "hess_dtype"),
    *("start", "numel", "columns", "rows_out", "columns_out"),
)


@pytest.fixture(params=["cpu_module", "emulated_module"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    found: ModuleType = request.getfixturevalue(request.param)
    return found


class Call:
    """A correct call of each function on 4 rows x 6 columns, to be spoilt."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.floats = torch.ones(24)
        self.rows, self.columns = torch.full((4,), -1.0, dtype=torch.float64), torch.full((6,), -1.0).double()
        self.workspace = torch.zeros(4096, dtype=torch.uint8)

    def fields(self, **changes: int) -> tuple[int, ...]:
        data = self.floats.data_ptr()
        values = (data, 0, data, 0, data, 0, 0, 24, 6, self.rows.data_ptr(), self.columns.data_ptr())
        return tuple((dict(zip(FIELDS, values, strict=True)) | changes).values())

    def run(self, function: str, items: Any, *first: int, **options: int) -> None:
        if hasattr(self._module, "workspace_bytes"):
            options = {"stream": 0} | options
            if function != "square_add":
                options = {"workspace_ptr": self.workspace.data_ptr(), "workspace_bytes": 4096} | options
        getattr(self._module, function)(*first, items, **options)

    def untouched(self) -> bool:
        return bool((self.rows == -1).all()) and bool((self.columns == -1).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 0}, "score item 0: weight is a null pointer"),
        ({"grad": 0}, "grad is a null pointer"),
        ({"hess": 0}, "hess is a null pointer"),
        ({"rows_out": 0}, "rows_out is a null pointer"),
        ({"columns_out": 0}, "columns_out is a null pointer"),
        ({"weight_dtype": 3}, "weight_dtype 3 is unknown: 0 fp32, 1 bf16, 2 fp16"),
        ({"grad_dtype": -1}, "grad_dtype -1 is unknown"),
        ({"hess_dtype": 9}, "hess_dtype 9 is unknown"),
        ({"hess_dtype": 1}, "no kernel for hess bf16"),
        ({"weight_dtype": 1, "grad_dtype": 2}, "no kernel for weight bf16 with grad fp16"),
        ({"start": -1}, "start -1 is not between 0 and"),
        ({"numel": -1}, "numel -1 is not between 0 and"),
        ({"columns": 0}, "columns 0 is not between 1 and"),
        ({"columns": -6}, "columns -6 is not between 1 and"),
    ],
)
def test_bad_fragments_are_refused(module: ModuleType, changes: dict[str, int], message: str) -> None:
    call = Call(module)
    with pytest.raises(ValueError, match=message):
        call.run("score", [call.fields(**changes)], 2)
    assert call.untouched()


@pytest.mark.parametrize("name", ["weight", "grad", "hess", "rows_out", "columns_out"])
def test_misaligned_pointers_are_refused(module: ModuleType, name: str) -> None:
    call = Call(module)
    pointer = dict(zip(FIELDS, call.fields(), strict=True))[name]
    with pytest.raises(ValueError, match=f"{name} is not aligned to its element size"):
        call.run("score", [call.fields(**{name: pointer + 2})], 2)
    assert call.untouched()


def test_sixteen_bit_pointers_need_two_bytes(module: ModuleType) -> None:
    call = Call(module)
    call.run("score", [call.fields(weight=call.floats.data_ptr() + 2, weight_dtype=1)], 4)
    with pytest.raises(ValueError, match="aligned to its element size of 2 bytes"):
        call.run("score", [call.fields(weight=call.floats.data_ptr() + 1, weight_dtype=1)], 4)


def test_operands_a_kind_does_not_use_may_be_null(module: ModuleType) -> None:
    call = Call(module)
    call.run("score", [call.fields(grad=0, grad_dtype=7, hess=0, hess_dtype=7)], 4)
    assert call.rows.tolist() == [6.0] * 4
    assert call.columns.tolist() == [4.0] * 6


@pytest.mark.parametrize("kind", [-1, 5])
def test_unknown_kinds_are_refused(module: ModuleType, kind: int) -> None:
    call = Call(module)
    with pytest.raises(ValueError, match=f"kind {kind} is unknown"):
        call.run("score", [call.fields()], kind)


@pytest.mark.parametrize("item", [(1, 2), [0] * 11, None])
def test_other_shapes_of_item_are_refused(module: ModuleType, item: object) -> None:
    call = Call(module)
    with pytest.raises(ValueError, match="score item 1: expected a tuple of 11 integers"):
        call.run("score", [call.fields(), item], 0)
    assert call.untouched()


def test_fields_must_be_integers_that_fit(module: ModuleType) -> None:
    call = Call(module)
    with pytest.raises(ValueError, match="field 7 is not an integer"):
        call.run("score", [(*call.fields()[:7], 24.0, *call.fields()[8:])], 0)
    with pytest.raises(OverflowError):
        call.run("score", [call.fields(numel=2**70)], 0)
    with pytest.raises(OverflowError):
        call.run("score", [call.fields(weight=-8)], 0)


def test_an_output_may_be_given_once(module: ModuleType) -> None:
    call = Call(module)
    rows = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="score item 1: columns_out is an output of an earlier item"):
        call.run("score", [call.fields(), call.fields(rows_out=rows.data_ptr())], 0)
    items = [(call.floats.data_ptr(), 0, 4, 6, call.columns.data_ptr())] * 2
    with pytest.raises(ValueError, match="column_square_sums item 1: out is an output"):
        call.run("column_square_sums", items)
    assert call.untouched()


@pytest.mark.parametrize(
    ("function", "item", "message"),
    [
        ("wanda_sums", (64, 0, 0, 24, 6, 0, 64, 128), "norms is a null pointer"),
        ("wanda_sums", (64, 5, 0, 24, 6, 64, 64, 128), "weight_dtype 5 is unknown"),
        ("wanda_sums", (64, 0, 0, 24, 0, 64, 64, 128), "columns 0 is not between"),
        ("column_square_sums", (64, 0, -1, 6, 64), "rows -1 is not between"),
        ("column_square_sums", (64, 0, 2**62, 6, 64), "is not between 0 and"),
        ("column_square_sums", (0, 0, 4, 6, 64), "x is a null pointer"),
        ("square_add", (64, 0, 64, -4), "numel -4 is not between"),
        ("square_add", (64, 4, 64, 4), "grad_dtype 4 is unknown"),
        ("square_add", (64, 0, 66, 4), "h is not aligned"),
        ("square_add", (66, 0, 64, 4), "grad is not aligned"),
    ],
)
def test_other_functions_check_too(module: ModuleType, function: str, item: tuple[int, ...], message: str) -> None:
    """The pointers here lead nowhere: a check that comes too late crashes."""
    with pytest.raises(ValueError, match=message):
        Call(module).run(function, [item])


def test_empty_fragments_give_zero_column_sums(module: ModuleType) -> None:
    call = Call(module)
    call.run("score", [call.fields(weight=0, grad=0, hess=0, numel=0, start=24, rows_out=0)], 2)
    assert call.columns.tolist() == [0.0] * 6
    call.run("square_add", [(0, 0, 0, 0)])
    for function in ("wanda_sums", "column_square_sums", "square_add"):
        call.run(function, [])
    call.run("score", [], 0)


def test_workspace_must_be_there_large_and_aligned(emulated_module: ModuleType) -> None:
    call = Call(emulated_module)
    needed = emulated_module.workspace_bytes([call.fields()])
    assert needed > 0
    with pytest.raises(ValueError, match=f"{needed - 1} bytes is too small: workspace_bytes says {needed}"):
        call.run("score", [call.fields()], 0, workspace_bytes=needed - 1)
    with pytest.raises(ValueError, match="workspace_ptr is a null pointer"):
        call.run("score", [call.fields()], 0, workspace_ptr=0)
    with pytest.raises(ValueError, match="workspace_ptr is not aligned"):
        call.run("score", [call.fields()], 0, workspace_ptr=call.workspace.data_ptr() + 8)
    assert call.untouched()
    call.run("score", [call.fields()], 0, workspace_bytes=needed)
    assert call.rows.tolist() == [6.0] * 4


def test_workspace_size_takes_all_tuple_forms(emulated_module: ModuleType) -> None:
    call = Call(emulated_module)
    score = emulated_module.workspace_bytes([call.fields()])
    wanda = emulated_module.workspace_bytes([(64, 0, 0, 24, 6, 64, 64, 128)])
    squares = emulated_module.workspace_bytes([(64, 0, 4, 6, 64)])
    assert score == wanda == squares
    with pytest.raises(ValueError, match="workspace_bytes item 0"):
        emulated_module.workspace_bytes([(1, 2, 3)])
