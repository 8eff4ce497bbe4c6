// The kernels that saliency_cuda.cu launches. A table of fragments travels as kernel parameter, so a list of any length
// costs two launches per kMaxFragments:
//   tile_sums    a block sums a tile of 64 rows x 2048 columns in fp32 and writes partial row and column sums;
//   combine      adds the partial sums in fp64, in the order of the tiles.
// No atomics: the same input gives the same bits, whatever the GPU's size or load.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "fragments.h"

namespace megatron_prune {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLanes = 8; // columns of a thread
constexpr int kTileColumns = kThreads * kLanes;
constexpr int kTileRows = static_cast<int>(kChunkRows);
constexpr int kSquareBlock = kThreads * kLanes * 4;

// Parameters of a kernel may take 32,764 bytes from CUDA 12.1 on, 4,096 before.
#ifndef MEGATRON_PRUNE_MAX_FRAGMENTS
#if CUDART_VERSION >= 12010
#define MEGATRON_PRUNE_MAX_FRAGMENTS 128
#else
#define MEGATRON_PRUNE_MAX_FRAGMENTS 32
#endif
#endif
constexpr int kMaxFragments = MEGATRON_PRUNE_MAX_FRAGMENTS;

struct Entry {
  Fragment fragment;
  long long first_row; // of the matrix; end_row is the one after the last that the fragment touches
  long long end_row;
  float *row_sums;    // [end_row - first_row, num_tiles]
  float *column_sums; // [num_chunks, columns]
  int num_tiles;      // tiles side by side
  int num_chunks;     // tiles one under the other
  bool vectors;       // 16-byte loads are aligned for every operand
};

struct Table {
  int count;
  unsigned sign_bits; // 0x7fffffff: abs of a product, 0xffffffff: the product
  bool add_to_columns;
  int first_tile[kMaxFragments + 1]; // of each entry in the grid of tile_sums; the last is the grid's size
  int first_item[kMaxFragments + 1]; // of each entry in the grid of combine
  Entry entries[kMaxFragments];
};

struct SquareTable {
  int count;
  int first_block[kMaxFragments + 1];
  Square items[kMaxFragments];
};

// Index of the entry that a block belongs to: the last whose first block is not beyond it. Empty entries own no block.
__device__ __forceinline__ int owner(const int *first, int count, int block) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first[middle] <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

template <class T> struct Format;
template <> struct Format<float> {
  using Bits = unsigned;
  static __device__ __forceinline__ float widen(unsigned bits) { return __uint_as_float(bits); }
};
template <> struct Format<BFloat16> {
  using Bits = unsigned short;
  static __device__ __forceinline__ float widen(unsigned bits) { return __uint_as_float(bits << 16); }
};
template <> struct Format<Float16> {
  using Bits = unsigned short;
  static __device__ __forceinline__ float widen(unsigned bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
};

// A thread's eight elements of one row, kept as loaded until they are used: 16-bit pairs stay packed.
// vectors: eight neighbours, by 16-byte loads; otherwise one element every kThreads columns, coalesced across threads.
template <class T, bool vectors> struct Octet {
  static constexpr int kPerWord = vectors ? 4 / static_cast<int>(sizeof(T)) : 1;
  unsigned words[kLanes / kPerWord];

  __device__ __forceinline__ void load(const void *data, long long element, unsigned mask) {
    const auto *source = static_cast<const typename Format<T>::Bits *>(data) + element;
    if constexpr (vectors) {
      if (mask == 0xffu) {
#pragma unroll
        for (int i = 0; i < kLanes / kPerWord; i += 4) {
          const uint4 four = __ldcs(reinterpret_cast<const uint4 *>(source + i * kPerWord));
          words[i] = four.x;
          words[i + 1] = four.y;
          words[i + 2] = four.z;
          words[i + 3] = four.w;
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kLanes / kPerWord; ++i)
      words[i] = 0;
#pragma unroll
    for (int i = 0; i < kLanes; ++i)
      if (mask >> i & 1u)
        words[i / kPerWord] |= static_cast<unsigned>(source[i * (vectors ? 1 : kThreads)])
                               << (kPerWord == 2 ? 16 * (i % 2) : 0);
  }

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (kPerWord == 2)
      return Format<T>::widen(words[i / 2] >> 16 * (i % 2) & 0xffffu);
    else
      return Format<T>::widen(words[i]);
  }
};

template <Operation operation>
__device__ __forceinline__ float element(float w, float g, float third, unsigned sign_bits) {
  if constexpr (operation == Operation::kProduct)
    return __uint_as_float(__float_as_uint(w * g) & sign_bits);
  if constexpr (operation == Operation::kDiagonal)
    return 0.5f * w * w * third;
  if constexpr (operation == Operation::kMixed)
    return fabsf(w * fmaf(0.5f * w, third, -g)); // one rounding inside: the terms may cancel without loss
  if constexpr (operation == Operation::kScaledMagnitude)
    return fabsf(w) * third;
  return w * w;
}

// Eight scores of a row; zero where the row does not belong to the fragment, whatever norms or data are there.
template <Operation operation, class W, class G, bool vectors>
__device__ __forceinline__ void score_row(const Fragment &fragment, long long row, int column, unsigned sign_bits,
                                          const float (&norms)[kLanes], float (&scores)[kLanes]) {
  constexpr bool uses_grad = operation == Operation::kProduct || operation == Operation::kMixed;
  constexpr bool uses_hess = operation == Operation::kDiagonal || operation == Operation::kMixed;
  constexpr int step = vectors ? 1 : kThreads;
  const long long element_index = row * fragment.columns + column - fragment.start;
  constexpr int span = (kLanes - 1) * step;
  unsigned mask = 0xffu;
  if (column + span >= fragment.columns || element_index < 0 || element_index + span >= fragment.numel) {
    mask = 0;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const long long at = element_index + i * step;
      if (column + i * step < fragment.columns && at >= 0 && at < fragment.numel)
        mask |= 1u << i;
    }
  }
  Octet<W, vectors> w;
  Octet<G, vectors> g;
  Octet<float, vectors> hess;
  w.load(fragment.weight, element_index, mask);
  if constexpr (uses_grad)
    g.load(fragment.grad, element_index, mask);
  if constexpr (uses_hess)
    hess.load(fragment.third, element_index, mask);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    float gradient = 0.0f, third = norms[i];
    if constexpr (uses_grad)
      gradient = g[i];
    if constexpr (uses_hess)
      third = hess[i];
    scores[i] = element<operation>(w[i], gradient, third, sign_bits);
  }
  if (mask != 0xffu) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i)
      if (!(mask >> i & 1u))
        scores[i] = 0.0f;
  }
}

__device__ __forceinline__ float tree_sum(const float (&s)[kLanes]) {
  return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

// Sums four values over the warp with six shuffles instead of twenty; lane 8 k has the total of value k.
__device__ __forceinline__ float sum_four(const float (&values)[4], int lane) {
  constexpr unsigned all = 0xffffffffu;
  const bool upper = lane & 16, odd = lane & 8;
  const float first = (upper ? values[2] : values[0]) + __shfl_xor_sync(all, upper ? values[0] : values[2], 16);
  const float second = (upper ? values[3] : values[1]) + __shfl_xor_sync(all, upper ? values[1] : values[3], 16);
  float total = (odd ? second : first) + __shfl_xor_sync(all, odd ? first : second, 8);
  total += __shfl_xor_sync(all, total, 4);
  total += __shfl_xor_sync(all, total, 2);
  return total + __shfl_xor_sync(all, total, 1);
}

template <Operation operation, class W, class G, bool vectors>
__device__ __forceinline__ void sum_tile(const Entry &entry, int tile, int chunk, unsigned sign_bits,
                                         float (&warp_sums)[kWarps][kTileRows]) {
  const Fragment &fragment = entry.fragment;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = tile * kTileColumns + static_cast<int>(threadIdx.x) * (vectors ? kLanes : 1);
  constexpr int step = vectors ? 1 : kThreads;
  float norms[kLanes];
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    norms[i] = 1.0f;
    if (operation == Operation::kScaledMagnitude && fragment.third != nullptr && column + i * step < fragment.columns)
      norms[i] = fragment.third[column + i * step];
  }
  const long long first_row = entry.first_row, end_row = entry.end_row;
  const long long origin = (first_row / kTileRows + chunk) * kTileRows;
  const int begin = static_cast<int>(max(first_row - origin, 0ll)) / 4 * 4;
  const int end = static_cast<int>(min(end_row - origin, static_cast<long long>(kTileRows)));
  float sums[kLanes] = {};
  for (int row = begin; row < end; row += 4) {
    float totals[4], pair[kLanes];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float a[kLanes], b[kLanes];
      score_row<operation, W, G, vectors>(fragment, origin + row + 2 * half, column, sign_bits, norms, a);
      score_row<operation, W, G, vectors>(fragment, origin + row + 2 * half + 1, column, sign_bits, norms, b);
      totals[2 * half] = tree_sum(a);
      totals[2 * half + 1] = tree_sum(b);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        if (half == 0)
          pair[i] = a[i] + b[i];
        else
          sums[i] += pair[i] + (a[i] + b[i]);
      }
    }
    const float total = sum_four(totals, lane);
    if (lane % 8 == 0)
      warp_sums[warp][row + lane / 8] = total;
  }
#pragma unroll
  for (int i = 0; i < kLanes; ++i)
    if (column + i * step < fragment.columns)
      entry.column_sums[chunk * fragment.columns + column + i * step] = sums[i];
  __syncthreads();
  const long long row = origin + threadIdx.x;
  if (fragment.rows_out == nullptr || threadIdx.x >= kTileRows || row < first_row || row >= end_row)
    return;
  float by_warp[kWarps];
#pragma unroll
  for (int i = 0; i < kWarps; ++i)
    by_warp[i] = warp_sums[i][threadIdx.x];
  entry.row_sums[(row - first_row) * entry.num_tiles + tile] = tree_sum(by_warp);
}

template <Operation operation, class W, class G>
__global__ void __launch_bounds__(kThreads, 2) tile_sums(const __grid_constant__ Table table) {
  __shared__ float warp_sums[kWarps][kTileRows];
  const int index = owner(table.first_tile, table.count, blockIdx.x);
  const Entry &entry = table.entries[index];
  const int number = blockIdx.x - table.first_tile[index];
  const int tile = number % entry.num_tiles, chunk = number / entry.num_tiles;
  if (entry.vectors)
    sum_tile<operation, W, G, true>(entry, tile, chunk, table.sign_bits, warp_sums);
  else
    sum_tile<operation, W, G, false>(entry, tile, chunk, table.sign_bits, warp_sums);
}

__global__ void __launch_bounds__(kThreads) combine(const __grid_constant__ Table table) {
  const int index = owner(table.first_item, table.count, blockIdx.x);
  const Entry &entry = table.entries[index];
  const Fragment &fragment = entry.fragment;
  const long long item = static_cast<long long>(blockIdx.x - table.first_item[index]) * kThreads + threadIdx.x;
  const long long num_rows = fragment.rows_out == nullptr ? 0 : entry.end_row - entry.first_row;
  double sum = 0.0;
  if (item < num_rows) {
    for (int tile = 0; tile < entry.num_tiles; ++tile)
      sum += entry.row_sums[item * entry.num_tiles + tile];
    fragment.rows_out[item] = sum;
    return;
  }
  const long long column = item - num_rows;
  if (column >= fragment.columns)
    return;
  for (int chunk = 0; chunk < entry.num_chunks; ++chunk)
    sum += entry.column_sums[chunk * fragment.columns + column];
  fragment.columns_out[column] = table.add_to_columns ? fragment.columns_out[column] + sum : sum;
}

template <class G> __global__ void __launch_bounds__(kThreads) add_squares(const __grid_constant__ SquareTable table) {
  const int index = owner(table.first_block, table.count, blockIdx.x);
  const Square &item = table.items[index];
  const long long begin = static_cast<long long>(blockIdx.x - table.first_block[index]) * kSquareBlock;
  const long long end = min(begin + kSquareBlock, static_cast<long long>(item.numel));
  const auto *grad = static_cast<const typename Format<G>::Bits *>(item.grad);
  const bool vectors = reinterpret_cast<std::uintptr_t>(item.grad) % 16 == 0 &&
                       reinterpret_cast<std::uintptr_t>(item.sum) % 16 == 0;
  if (!vectors) {
    for (long long i = begin + threadIdx.x; i < end; i += kThreads) {
      const float g = Format<G>::widen(grad[i]);
      item.sum[i] = fmaf(g, g, item.sum[i]);
    }
    return;
  }
  for (long long i = begin + threadIdx.x * kLanes; i < end; i += kTileColumns) {
    const unsigned mask = end - i >= kLanes ? 0xffu : (1u << (end - i)) - 1u;
    Octet<G, true> g;
    Octet<float, true> h;
    g.load(item.grad, i, mask);
    h.load(item.sum, i, mask);
    float sums[kLanes];
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
      sums[k] = fmaf(g[k], g[k], h[k]);
    if (mask == 0xffu) {
      __stcs(reinterpret_cast<float4 *>(item.sum + i), make_float4(sums[0], sums[1], sums[2], sums[3]));
      __stcs(reinterpret_cast<float4 *>(item.sum + i + 4), make_float4(sums[4], sums[5], sums[6], sums[7]));
    } else {
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
        if (mask >> k & 1u)
          item.sum[i + k] = sums[k];
    }
  }
}

} // namespace
} // namespace megatron_prune
