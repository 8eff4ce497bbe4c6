// The values that the CPU and CUDA kernels share: dtypes, operations, fragments and their checks. No Python, no CUDA.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace megatron_prune {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Storage only: 16-bit floats are widened to fp32 before any arithmetic.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// What is summed, element by element.
enum class Operation : int {
  kProduct,         // w g, or its abs
  kDiagonal,        // 0.5 w^2 H
  kMixed,           // |-w g + 0.5 w^2 H|
  kMagnitude,       // |w|
  kScaledMagnitude, // |w| norms[column]
  kSquare,          // w^2
};

struct Reduction {
  Operation operation = Operation::kProduct;
  bool absolute = true;        // kProduct: sum |w g| rather than w g
  bool add_to_columns = false; // add to columns_out instead of overwriting it
};

// A contiguous piece of a row-major matrix [rows, columns]: elements start .. start + numel - 1, flattened.
struct Fragment {
  const void *weight = nullptr;
  const void *grad = nullptr;
  const float *third = nullptr; // the Hessian diagonal, or norms [columns]
  Dtype weight_dtype = Dtype::kFloat32;
  Dtype grad_dtype = Dtype::kFloat32;
  std::int64_t start = 0;
  std::int64_t numel = 0;
  std::int64_t columns = 1;
  double *rows_out = nullptr;    // [num_rows()]; null: no row sums wanted
  double *columns_out = nullptr; // [columns]

  std::int64_t first_row() const { return start / columns; }
  std::int64_t end_row() const { return numel == 0 ? first_row() : (start + numel - 1) / columns + 1; }
  std::int64_t num_rows() const { return end_row() - first_row(); }
};

// h += grad * grad
struct Square {
  const void *grad = nullptr;
  Dtype dtype = Dtype::kFloat32;
  float *sum = nullptr;
  std::int64_t numel = 0;
};

// Rows summed in fp32; the grid of chunks starts at row 0 of the matrix, wherever a fragment starts.
constexpr std::int64_t kChunkRows = 64;
constexpr std::int64_t kMaxColumns = std::int64_t{1} << 30;
constexpr std::int64_t kMaxElements = std::int64_t{1} << 48;

inline std::int64_t item_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

inline const char *dtype_name(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? "fp32" : dtype == Dtype::kBFloat16 ? "bf16" : "fp16";
}

[[noreturn]] inline void invalid(const std::string &where, const std::string &what) {
  throw std::invalid_argument(where + ": " + what);
}

inline Dtype check_dtype(const std::string &where, const char *name, std::int64_t code) {
  if (code < 0 || code > 2)
    invalid(where, std::string(name) + "_dtype " + std::to_string(code) + " is unknown: 0 fp32, 1 bf16, 2 fp16");
  return static_cast<Dtype>(code);
}

inline void check_pointer(const std::string &where, const char *name, std::uintptr_t pointer, std::int64_t size) {
  if (pointer == 0)
    invalid(where, std::string(name) + " is a null pointer");
  if (pointer % static_cast<std::uintptr_t>(size) != 0)
    invalid(where, std::string(name) + " is not aligned to its element size of " + std::to_string(size) + " bytes");
}

inline void check_size(const std::string &where, const char *name, std::int64_t value, std::int64_t least,
                       std::int64_t most) {
  if (value < least || value > most)
    invalid(where, std::string(name) + " " + std::to_string(value) + " is not between " + std::to_string(least) +
                       " and " + std::to_string(most));
}

// 16-bit formats meet fp32 (masters, accumulated gradients) or themselves; bf16 with fp16 is compiled nowhere.
inline void check_pair(const std::string &where, Dtype weight, Dtype grad) {
  if (weight != grad && weight != Dtype::kFloat32 && grad != Dtype::kFloat32)
    invalid(where, std::string("no kernel for weight ") + dtype_name(weight) + " with grad " + dtype_name(grad) +
                       ": convert one of them to fp32");
}

} // namespace megatron_prune
