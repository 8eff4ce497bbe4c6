// From Python tuples to checked fragments, the same for both modules.
#pragma once

#include <set>

#include <pybind11/pybind11.h>

#include "fragments.h"

namespace megatron_prune {

namespace py = pybind11;

// A tuple of the expected length, read by position.
class Fields {
public:
  Fields(const py::handle &item, const std::string &function, std::size_t index, std::size_t length)
      : where(function + " item " + std::to_string(index)) {
    if (!py::isinstance<py::tuple>(item) || py::len(item) != length)
      invalid(where, "expected a tuple of " + std::to_string(length) + " integers");
    tuple_ = py::reinterpret_borrow<py::tuple>(item);
  }

  std::int64_t integer(std::size_t position) const {
    const long long value = PyLong_AsLongLong(object(position));
    if (value == -1 && PyErr_Occurred())
      throw py::error_already_set();
    return value;
  }

  std::uintptr_t pointer(std::size_t position) const {
    const std::size_t value = PyLong_AsSize_t(object(position));
    if (value == static_cast<std::size_t>(-1) && PyErr_Occurred())
      throw py::error_already_set();
    return value;
  }

  const std::string where;

private:
  PyObject *object(std::size_t position) const {
    PyObject *value = PyTuple_GET_ITEM(tuple_.ptr(), static_cast<Py_ssize_t>(position));
    if (!PyLong_Check(value))
      invalid(where, "field " + std::to_string(position) + " is not an integer");
    return value;
  }

  py::tuple tuple_;
};

// Refuses an output that two fragments of one call would write: on a GPU they would race.
class Outputs {
public:
  double *take(const Fields &fields, const char *name, std::uintptr_t pointer) {
    check_pointer(fields.where, name, pointer, 8);
    if (!seen_.insert(pointer).second)
      invalid(fields.where, std::string(name) + " is an output of an earlier item of this call");
    return reinterpret_cast<double *>(pointer);
  }

private:
  std::set<std::uintptr_t> seen_;
};

inline void check_extent(const Fields &fields, const Fragment &fragment) {
  check_size(fields.where, "start", fragment.start, 0, kMaxElements);
  check_size(fields.where, "numel", fragment.numel, 0, kMaxElements);
  check_size(fields.where, "columns", fragment.columns, 1, kMaxColumns);
}

// Null is accepted for an empty tensor only, which torch gives no memory.
inline const void *operand(const Fields &fields, const char *name, std::uintptr_t pointer, Dtype dtype,
                           std::int64_t numel) {
  if (numel > 0)
    check_pointer(fields.where, name, pointer, item_size(dtype));
  return reinterpret_cast<const void *>(pointer);
}

inline Reduction reduction_of_kind(std::int64_t kind) {
  switch (kind) {
  case 0:
    return {Operation::kProduct, true, false};
  case 1:
    return {Operation::kDiagonal, true, false};
  case 2:
    return {Operation::kMixed, true, false};
  case 3:
    return {Operation::kProduct, false, false};
  case 4:
    return {Operation::kMagnitude, true, false};
  default:
    invalid("score", "kind " + std::to_string(kind) +
                         " is unknown: 0 taylor, 1 diag-hessian, 2 taylor-mixed, 3 signed product, 4 magnitude");
  }
}

inline std::vector<Fragment> score_fragments(const py::list &items, Operation operation) {
  const bool uses_grad = operation == Operation::kProduct || operation == Operation::kMixed;
  const bool uses_hess = operation == Operation::kDiagonal || operation == Operation::kMixed;
  std::vector<Fragment> fragments;
  Outputs outputs;
  for (const py::handle &item : items) {
    const Fields fields(item, "score", fragments.size(), 11);
    Fragment fragment;
    fragment.start = fields.integer(6);
    fragment.numel = fields.integer(7);
    fragment.columns = fields.integer(8);
    check_extent(fields, fragment);
    fragment.weight_dtype = check_dtype(fields.where, "weight", fields.integer(1));
    fragment.weight = operand(fields, "weight", fields.pointer(0), fragment.weight_dtype, fragment.numel);
    if (uses_grad) {
      fragment.grad_dtype = check_dtype(fields.where, "grad", fields.integer(3));
      fragment.grad = operand(fields, "grad", fields.pointer(2), fragment.grad_dtype, fragment.numel);
      check_pair(fields.where, fragment.weight_dtype, fragment.grad_dtype);
    }
    if (uses_hess) {
      const Dtype dtype = check_dtype(fields.where, "hess", fields.integer(5));
      if (dtype != Dtype::kFloat32)
        invalid(fields.where, std::string("no kernel for hess ") + dtype_name(dtype) + ": it is kept in fp32");
      fragment.third = static_cast<const float *>(operand(fields, "hess", fields.pointer(4), dtype, fragment.numel));
    }
    fragment.rows_out = fragment.numel > 0 ? outputs.take(fields, "rows_out", fields.pointer(9)) : nullptr;
    fragment.columns_out = outputs.take(fields, "columns_out", fields.pointer(10));
    fragments.push_back(fragment);
  }
  return fragments;
}

inline std::vector<Fragment> wanda_fragments(const py::list &items) {
  std::vector<Fragment> fragments;
  Outputs outputs;
  for (const py::handle &item : items) {
    const Fields fields(item, "wanda_sums", fragments.size(), 8);
    Fragment fragment;
    fragment.start = fields.integer(2);
    fragment.numel = fields.integer(3);
    fragment.columns = fields.integer(4);
    check_extent(fields, fragment);
    fragment.weight_dtype = check_dtype(fields.where, "weight", fields.integer(1));
    fragment.weight = operand(fields, "weight", fields.pointer(0), fragment.weight_dtype, fragment.numel);
    check_pointer(fields.where, "norms", fields.pointer(5), 4);
    fragment.third = reinterpret_cast<const float *>(fields.pointer(5));
    fragment.rows_out = fragment.numel > 0 ? outputs.take(fields, "rows_out", fields.pointer(6)) : nullptr;
    fragment.columns_out = outputs.take(fields, "columns_out", fields.pointer(7));
    fragments.push_back(fragment);
  }
  return fragments;
}

inline std::vector<Fragment> square_sum_fragments(const py::list &items) {
  std::vector<Fragment> fragments;
  Outputs outputs;
  for (const py::handle &item : items) {
    const Fields fields(item, "column_square_sums", fragments.size(), 5);
    const std::int64_t rows = fields.integer(2);
    Fragment fragment;
    fragment.columns = fields.integer(3);
    check_size(fields.where, "columns", fragment.columns, 1, kMaxColumns);
    check_size(fields.where, "rows", rows, 0, kMaxElements / fragment.columns);
    fragment.numel = rows * fragment.columns;
    fragment.weight_dtype = check_dtype(fields.where, "x", fields.integer(1));
    fragment.weight = operand(fields, "x", fields.pointer(0), fragment.weight_dtype, fragment.numel);
    fragment.columns_out = outputs.take(fields, "out", fields.pointer(4));
    fragments.push_back(fragment);
  }
  return fragments;
}

inline std::vector<Square> squares(const py::list &items) {
  std::vector<Square> result;
  for (const py::handle &item : items) {
    const Fields fields(item, "square_add", result.size(), 4);
    Square square;
    square.numel = fields.integer(3);
    check_size(fields.where, "numel", square.numel, 0, kMaxElements);
    square.dtype = check_dtype(fields.where, "grad", fields.integer(1));
    square.grad = operand(fields, "grad", fields.pointer(0), square.dtype, square.numel);
    square.sum = static_cast<float *>(
        const_cast<void *>(operand(fields, "h", fields.pointer(2), Dtype::kFloat32, square.numel)));
    result.push_back(square);
  }
  return result;
}

} // namespace megatron_prune
