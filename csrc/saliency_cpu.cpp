// CPU kernels. One template does every operation and dtype; it is compiled for the base instruction set and, on x86,
// again for AVX2 with FMA through target attributes, so one binary runs everywhere and needs no -march flag.
#include "saliency_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define MEGATRON_PRUNE_AVX2 1
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#else
#define MEGATRON_PRUNE_AVX2 0
#endif
#define ALWAYS_INLINE __attribute__((always_inline)) inline

namespace megatron_prune {
namespace {

#ifdef __FP_FAST_FMAF // AArch64 and the like: fma is part of the base instruction set
constexpr bool kBaseHasFma = true;
#else
constexpr bool kBaseHasFma = false;
#endif

// Columns summed in fp32 before a row sum goes on in fp64.
constexpr std::int64_t kRowBlock = 64;
constexpr std::int64_t kCombineBlock = 1024;
constexpr std::int64_t kSquareBlock = std::int64_t{1} << 16;

template <class To, class From> ALWAYS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

ALWAYS_INLINE float widen(float value) { return value; }

ALWAYS_INLINE float widen(BFloat16 value) { return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16); }

// By integers and selects, so that it vectorises without F16C; subnormals go through an int-to-float conversion, which
// a flush-denormals mode of the processor does not touch.
ALWAYS_INLINE float widen(Float16 value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::int32_t magnitude = value.bits & 0x7fff;
  const std::uint32_t shifted = static_cast<std::uint32_t>(magnitude) << 13;
  const std::uint32_t normal = shifted + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u);
  const std::uint32_t subnormal = bit_cast<std::uint32_t>(static_cast<float>(magnitude) * 0x1p-24f);
  return bit_cast<float>(sign | (magnitude < 0x0400 ? subnormal : normal));
}

// kSignBits: 0x7fffffff takes the abs of a product, 0xffffffff leaves its sign.
template <Operation operation, bool has_fma>
ALWAYS_INLINE float element(float w, float g, float third, std::uint32_t sign_bits) {
  if constexpr (operation == Operation::kProduct)
    return bit_cast<float>(bit_cast<std::uint32_t>(w * g) & sign_bits);
  if constexpr (operation == Operation::kDiagonal)
    return 0.5f * w * w * third;
  // One rounding inside the brackets: the two terms may cancel without loss.
  if constexpr (operation == Operation::kMixed) {
    if constexpr (has_fma)
      return std::fabs(w * __builtin_fmaf(0.5f * w, third, -g));
    else
      return std::fabs(w * static_cast<float>(0.5 * w * third - g));
  }
  if constexpr (operation == Operation::kMagnitude)
    return std::fabs(w);
  if constexpr (operation == Operation::kScaledMagnitude)
    return std::fabs(w) * third;
  return w * w;
}

struct Chunk {
  const Fragment *fragment;
  std::int64_t row; // rows row .. end_row - 1 of the matrix, at most kChunkRows
  std::int64_t end_row;
  float *column_sums; // [columns], overwritten
  std::uint32_t sign_bits;
};

// The operands of one row, indexed by column; those an operation has not are never read.
template <class W, class G> struct Row {
  const W *w;
  const G *g;
  const float *third;
};

template <Operation operation, class W, class G>
ALWAYS_INLINE Row<W, G> row_operands(const Fragment &fragment, std::int64_t offset) {
  constexpr bool per_column = operation == Operation::kScaledMagnitude;
  return {static_cast<const W *>(fragment.weight) + offset, static_cast<const G *>(fragment.grad) + offset,
          fragment.third + (per_column ? 0 : offset)};
}

template <Operation operation, bool has_fma, class W, class G>
ALWAYS_INLINE float score(const Row<W, G> &row, std::int64_t column, std::uint32_t sign_bits) {
  constexpr bool uses_grad = operation == Operation::kProduct || operation == Operation::kMixed;
  constexpr bool uses_third = operation == Operation::kDiagonal || operation == Operation::kMixed ||
                              operation == Operation::kScaledMagnitude;
  float g = 0.0f, third = 0.0f;
  if constexpr (uses_grad)
    g = widen(row.g[column]);
  if constexpr (uses_third)
    third = row.third[column];
  return element<operation, has_fma>(widen(row.w[column]), g, third, sign_bits);
}

template <Operation operation, bool has_fma, class W, class G>
ALWAYS_INLINE double sum_row(const Row<W, G> row, std::int64_t first, std::int64_t last, float *columns,
                             std::uint32_t sign_bits) {
  double total = 0.0;
  for (std::int64_t block = first; block < last; block += kRowBlock) {
    const std::int64_t end = std::min(block + kRowBlock, last);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t column = block; column < end; ++column) {
      const float s = score<operation, has_fma>(row, column, sign_bits);
      sum += s;
      columns[column] += s;
    }
    total += sum;
  }
  return total;
}

// Four whole rows at once: a quarter of the traffic to the column sums, and a quarter of the roundings in them.
template <Operation operation, bool has_fma, class W, class G>
ALWAYS_INLINE void sum_four_rows(const Row<W, G> a, const Row<W, G> b, const Row<W, G> c, const Row<W, G> d,
                                 std::int64_t num_columns, float *columns, double *totals, std::uint32_t sign_bits) {
  double total_a = 0.0, total_b = 0.0, total_c = 0.0, total_d = 0.0;
  for (std::int64_t block = 0; block < num_columns; block += kRowBlock) {
    const std::int64_t end = std::min(block + kRowBlock, num_columns);
    float sum_a = 0.0f, sum_b = 0.0f, sum_c = 0.0f, sum_d = 0.0f;
#pragma omp simd reduction(+ : sum_a, sum_b, sum_c, sum_d)
    for (std::int64_t column = block; column < end; ++column) {
      const float s = score<operation, has_fma>(a, column, sign_bits);
      const float t = score<operation, has_fma>(b, column, sign_bits);
      const float u = score<operation, has_fma>(c, column, sign_bits);
      const float v = score<operation, has_fma>(d, column, sign_bits);
      sum_a += s;
      sum_b += t;
      sum_c += u;
      sum_d += v;
      columns[column] += (s + t) + (u + v);
    }
    total_a += sum_a;
    total_b += sum_b;
    total_c += sum_c;
    total_d += sum_d;
  }
  totals[0] = total_a;
  totals[1] = total_b;
  totals[2] = total_c;
  totals[3] = total_d;
}

template <Operation operation, bool has_fma, class W, class G> ALWAYS_INLINE void sum_chunk(const Chunk &chunk) {
  const Fragment &fragment = *chunk.fragment;
  const std::int64_t columns = fragment.columns;
  double *rows_out = fragment.rows_out;
  std::fill(chunk.column_sums, chunk.column_sums + columns, 0.0f);
  for (std::int64_t row = chunk.row; row < chunk.end_row;) {
    const std::int64_t offset = row * columns - fragment.start; // of the row's column 0, negative before the fragment
    const Row<W, G> operands = row_operands<operation, W, G>(fragment, offset);
    double totals[4];
    std::int64_t num_rows = 1;
    if (offset >= 0 && row + 4 <= chunk.end_row && offset + 4 * columns <= fragment.numel) {
      num_rows = 4;
      sum_four_rows<operation, has_fma, W, G>(operands, row_operands<operation, W, G>(fragment, offset + columns),
                                              row_operands<operation, W, G>(fragment, offset + 2 * columns),
                                              row_operands<operation, W, G>(fragment, offset + 3 * columns), columns,
                                              chunk.column_sums, totals, chunk.sign_bits);
    } else {
      const std::int64_t first = std::max<std::int64_t>(0, -offset);
      const std::int64_t last = std::min(columns, fragment.numel - offset);
      totals[0] = sum_row<operation, has_fma, W, G>(operands, first, last, chunk.column_sums, chunk.sign_bits);
    }
    if (rows_out != nullptr)
      std::copy(totals, totals + num_rows, rows_out + (row - fragment.first_row()));
    row += num_rows;
  }
}

using ChunkFunction = void (*)(const Chunk &);

template <Operation operation, class W, class G> void sum_chunk_base(const Chunk &chunk) {
  sum_chunk<operation, kBaseHasFma, W, G>(chunk);
}

template <class G> ALWAYS_INLINE void add_squares(const void *grad, float *sum, std::int64_t numel) {
  const G *values = static_cast<const G *>(grad);
#pragma omp simd
  for (std::int64_t i = 0; i < numel; ++i) {
    const float g = widen(values[i]);
    sum[i] += g * g;
  }
}

using SquareFunction = void (*)(const void *, float *, std::int64_t);

template <class G> void add_squares_base(const void *grad, float *sum, std::int64_t numel) {
  add_squares<G>(grad, sum, numel);
}

#if MEGATRON_PRUNE_AVX2
template <Operation operation, class W, class G> TARGET_AVX2 void sum_chunk_avx2(const Chunk &chunk) {
  sum_chunk<operation, true, W, G>(chunk);
}

template <class G> TARGET_AVX2 void add_squares_avx2(const void *grad, float *sum, std::int64_t numel) {
  add_squares<G>(grad, sum, numel);
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
bool has_avx2() { return false; }
#endif

template <Operation operation, class W, class G> ChunkFunction version(bool avx2) {
#if MEGATRON_PRUNE_AVX2
  if (avx2)
    return sum_chunk_avx2<operation, W, G>;
#endif
  (void)avx2;
  return sum_chunk_base<operation, W, G>;
}

template <class G> SquareFunction square_version(bool avx2) {
#if MEGATRON_PRUNE_AVX2
  if (avx2)
    return add_squares_avx2<G>;
#endif
  (void)avx2;
  return add_squares_base<G>;
}

template <Operation operation> ChunkFunction of_weight(Dtype weight, bool avx2) {
  switch (weight) {
  case Dtype::kFloat32:
    return version<operation, float, float>(avx2);
  case Dtype::kBFloat16:
    return version<operation, BFloat16, float>(avx2);
  default:
    return version<operation, Float16, float>(avx2);
  }
}

template <Operation operation> ChunkFunction of_pair(Dtype weight, Dtype grad, bool avx2) {
  if (grad == Dtype::kFloat32)
    return of_weight<operation>(weight, avx2);
  if (weight == Dtype::kFloat32)
    return grad == Dtype::kBFloat16 ? version<operation, float, BFloat16>(avx2)
                                    : version<operation, float, Float16>(avx2);
  if (weight != grad)
    throw std::invalid_argument("no kernel for bf16 with fp16");
  return weight == Dtype::kBFloat16 ? version<operation, BFloat16, BFloat16>(avx2)
                                    : version<operation, Float16, Float16>(avx2);
}

ChunkFunction select(Operation operation, const Fragment &fragment, bool avx2) {
  switch (operation) {
  case Operation::kProduct:
    return of_pair<Operation::kProduct>(fragment.weight_dtype, fragment.grad_dtype, avx2);
  case Operation::kDiagonal:
    return of_weight<Operation::kDiagonal>(fragment.weight_dtype, avx2);
  case Operation::kMixed:
    return of_pair<Operation::kMixed>(fragment.weight_dtype, fragment.grad_dtype, avx2);
  case Operation::kMagnitude:
    return of_weight<Operation::kMagnitude>(fragment.weight_dtype, avx2);
  case Operation::kScaledMagnitude:
    return of_weight<Operation::kScaledMagnitude>(fragment.weight_dtype, avx2);
  default:
    return of_weight<Operation::kSquare>(fragment.weight_dtype, avx2);
  }
}

// Second stage: the chunks' column sums in fp64, in the order of the chunks.
void combine(const std::vector<float> &chunk_sums, std::int64_t num_chunks, std::int64_t columns, std::int64_t first,
             bool add, double *out) {
  const std::int64_t width = std::min(kCombineBlock, columns - first);
  double sums[kCombineBlock];
  std::fill(sums, sums + width, 0.0);
  for (std::int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const float *part = chunk_sums.data() + chunk * columns + first;
    for (std::int64_t i = 0; i < width; ++i)
      sums[i] += part[i];
  }
  for (std::int64_t i = 0; i < width; ++i)
    out[first + i] = add ? out[first + i] + sums[i] : sums[i];
}

} // namespace

void reduce_on_cpu(const Reduction &reduction, const std::vector<Fragment> &fragments, bool simd) {
  const std::uint32_t sign_bits = reduction.absolute ? 0x7fffffffu : 0xffffffffu;
  std::vector<float> chunk_sums;
  for (const Fragment &fragment : fragments) {
    const std::int64_t first_chunk = fragment.first_row() / kChunkRows;
    const std::int64_t num_chunks =
        fragment.numel == 0 ? 0 : (fragment.end_row() - 1) / kChunkRows + 1 - first_chunk;
    const std::int64_t columns = fragment.columns;
    const ChunkFunction sum = select(reduction.operation, fragment, simd && has_avx2());
    chunk_sums.resize(std::max(chunk_sums.size(), static_cast<std::size_t>(num_chunks * columns)));
#pragma omp parallel
    {
      // Which thread takes a chunk changes nothing: chunks are fixed and each has its own place for its sums.
#pragma omp for schedule(dynamic)
      for (std::int64_t i = 0; i < num_chunks; ++i) {
        const std::int64_t begin = (first_chunk + i) * kChunkRows;
        sum({&fragment, std::max(begin, fragment.first_row()), std::min(begin + kChunkRows, fragment.end_row()),
             chunk_sums.data() + i * columns, sign_bits});
      }
#pragma omp for schedule(static)
      for (std::int64_t first = 0; first < columns; first += kCombineBlock)
        combine(chunk_sums, num_chunks, columns, first, reduction.add_to_columns, fragment.columns_out);
    }
  }
}

void square_add_on_cpu(const std::vector<Square> &items, bool simd) {
  const bool avx2 = simd && has_avx2();
  for (const Square &item : items) {
    const SquareFunction add = item.dtype == Dtype::kFloat32    ? square_version<float>(avx2)
                               : item.dtype == Dtype::kBFloat16 ? square_version<BFloat16>(avx2)
                                                                : square_version<Float16>(avx2);
#pragma omp parallel for schedule(static)
    for (std::int64_t begin = 0; begin < item.numel; begin += kSquareBlock)
      add(static_cast<const char *>(item.grad) + begin * item_size(item.dtype), item.sum + begin,
          std::min(kSquareBlock, item.numel - begin));
  }
}

const char *instruction_set() { return has_avx2() ? "avx2" : "base"; }

int num_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

} // namespace megatron_prune
