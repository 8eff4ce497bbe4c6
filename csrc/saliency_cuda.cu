// Host side of the CUDA kernels: checks, tables, launches.
#include "saliency_cuda.h"

#include <cuda_runtime.h>

#include "cuda_kernels.h"

namespace megatron_prune {
namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess)
    return;
  cudaGetLastError(); // it is reported here; the next launch must not report it again
  const char *hint = "the device is in an error state, see the message";
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver)
    hint = "no usable GPU: check nvidia-smi, CUDA_VISIBLE_DEVICES and that the driver is no older than the runtime";
  else if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    hint = "not compiled for this GPU: rebuild with its compute capability in MEGATRON_PRUNE_CUDA_ARCHS";
  throw std::runtime_error(std::string("saliency kernel: ") + cudaGetErrorString(error) + " (" + hint + ")");
}

template <class Parameters>
void launch(void (*kernel)(Parameters), int blocks, Parameters &parameters, cudaStream_t stream) {
  void *arguments[] = {&parameters};
  if (blocks > 0)
    check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0, stream));
}

// Blocks are counted in int, which a list of fragments beyond any GPU's memory would pass.
int count_blocks(int blocks, std::int64_t more) {
  if (more > 0x7fffffff - blocks)
    throw std::invalid_argument("saliency kernel: more than 2^31 - 1 blocks in one call, split the list");
  return blocks + static_cast<int>(more);
}

std::int64_t chunks_of(const Fragment &fragment) {
  return fragment.numel == 0 ? 0 : (fragment.end_row() - 1) / kTileRows + 1 - fragment.first_row() / kTileRows;
}

std::int64_t tiles_of(const Fragment &fragment) { return (fragment.columns + kTileColumns - 1) / kTileColumns; }

// In floats, each part rounded up to 16 bytes.
std::int64_t row_part(const Fragment &fragment) { return (fragment.num_rows() * tiles_of(fragment) + 3) / 4 * 4; }
std::int64_t column_part(const Fragment &fragment) { return (chunks_of(fragment) * fragment.columns + 3) / 4 * 4; }

// 16-byte loads need every row of every operand to start at the same place of a 16-byte word: where element 0 of the
// matrix would lie, had the whole matrix been there.
bool vectors_fit(const Fragment &fragment, bool uses_grad, bool uses_hess) {
  const auto fits = [&fragment](const void *pointer, std::int64_t size) {
    return (reinterpret_cast<std::uintptr_t>(pointer) - static_cast<std::uintptr_t>(fragment.start * size)) % 16 == 0;
  };
  return fragment.columns % kLanes == 0 && fits(fragment.weight, item_size(fragment.weight_dtype)) &&
         (!uses_grad || fits(fragment.grad, item_size(fragment.grad_dtype))) &&
         (!uses_hess || fits(fragment.third, 4));
}

using TileKernel = void (*)(Table);

template <Operation operation> TileKernel of_weight(Dtype weight) {
  return weight == Dtype::kFloat32    ? tile_sums<operation, float, float>
         : weight == Dtype::kBFloat16 ? tile_sums<operation, BFloat16, float>
                                      : tile_sums<operation, Float16, float>;
}

template <Operation operation> TileKernel of_pair(Dtype weight, Dtype grad) {
  if (grad == Dtype::kFloat32)
    return of_weight<operation>(weight);
  if (weight == Dtype::kFloat32)
    return grad == Dtype::kBFloat16 ? tile_sums<operation, float, BFloat16> : tile_sums<operation, float, Float16>;
  if (weight != grad)
    throw std::invalid_argument("no kernel for bf16 with fp16");
  return weight == Dtype::kBFloat16 ? tile_sums<operation, BFloat16, BFloat16> : tile_sums<operation, Float16, Float16>;
}

TileKernel select(Operation operation, Dtype weight, Dtype grad) {
  switch (operation) {
  case Operation::kProduct:
    return of_pair<Operation::kProduct>(weight, grad);
  case Operation::kDiagonal:
    return of_weight<Operation::kDiagonal>(weight);
  case Operation::kMixed:
    return of_pair<Operation::kMixed>(weight, grad);
  case Operation::kMagnitude: // norms null: all ones
  case Operation::kScaledMagnitude:
    return of_weight<Operation::kScaledMagnitude>(weight);
  default:
    return of_weight<Operation::kSquare>(weight);
  }
}

// Both launches for up to kMaxFragments fragments of one dtype pair, whose partial sums start at `workspace`.
void reduce_table(const Reduction &reduction, const std::vector<Fragment> &fragments, cudaStream_t stream,
                  float *workspace) {
  const bool uses_grad = reduction.operation == Operation::kProduct || reduction.operation == Operation::kMixed;
  const bool uses_hess = reduction.operation == Operation::kDiagonal || reduction.operation == Operation::kMixed;
  Table table = {};
  table.sign_bits = reduction.absolute ? 0x7fffffffu : 0xffffffffu;
  table.add_to_columns = reduction.add_to_columns;
  int tiles = 0, items = 0;
  for (const Fragment &fragment : fragments) {
    Entry &entry = table.entries[table.count];
    entry.fragment = fragment;
    entry.first_row = fragment.first_row();
    entry.end_row = fragment.end_row();
    entry.num_tiles = static_cast<int>(tiles_of(fragment));
    entry.row_sums = workspace;
    entry.column_sums = workspace + row_part(fragment);
    entry.vectors = vectors_fit(fragment, uses_grad, uses_hess);
    workspace += row_part(fragment) + column_part(fragment);
    table.first_tile[table.count] = tiles;
    table.first_item[table.count] = items;
    tiles = count_blocks(tiles, chunks_of(fragment) * entry.num_tiles);
    entry.num_chunks = static_cast<int>(chunks_of(fragment));
    const std::int64_t num_rows = fragment.rows_out == nullptr ? 0 : fragment.num_rows();
    items = count_blocks(items, (num_rows + fragment.columns + kThreads - 1) / kThreads);
    ++table.count;
  }
  table.first_tile[table.count] = tiles;
  table.first_item[table.count] = items;
  launch(select(reduction.operation, fragments[0].weight_dtype, fragments[0].grad_dtype), tiles, table, stream);
  launch(combine, items, table, stream);
}

} // namespace

std::size_t workspace_bytes(const std::vector<Fragment> &fragments) {
  std::int64_t floats = 0;
  for (const Fragment &fragment : fragments)
    floats += row_part(fragment) + column_part(fragment);
  return static_cast<std::size_t>(floats) * sizeof(float);
}

void reduce_on_cuda(const Reduction &reduction, const std::vector<Fragment> &fragments, void *stream, void *workspace,
                    std::size_t size) {
  const std::size_t needed = workspace_bytes(fragments);
  if (size < needed)
    throw std::invalid_argument("workspace of " + std::to_string(size) + " bytes is too small: workspace_bytes says " +
                                std::to_string(needed));
  if (needed > 0)
    check_pointer("workspace", "workspace_ptr", reinterpret_cast<std::uintptr_t>(workspace), 16);
  float *next = static_cast<float *>(workspace);
  // One table per dtype pair (templates) and kMaxFragments fragments.
  for (int pair = 0; pair < 9; ++pair) {
    std::vector<Fragment> same;
    for (std::size_t i = 0; i <= fragments.size(); ++i) {
      if (same.size() == kMaxFragments || (i == fragments.size() && !same.empty())) {
        reduce_table(reduction, same, static_cast<cudaStream_t>(stream), next);
        next += workspace_bytes(same) / sizeof(float);
        same.clear();
      }
      if (i < fragments.size() &&
          static_cast<int>(fragments[i].weight_dtype) * 3 + static_cast<int>(fragments[i].grad_dtype) == pair)
        same.push_back(fragments[i]);
    }
  }
}

void square_add_on_cuda(const std::vector<Square> &items, void *stream) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    const auto kernel = dtype == Dtype::kFloat32    ? add_squares<float>
                        : dtype == Dtype::kBFloat16 ? add_squares<BFloat16>
                                                    : add_squares<Float16>;
    SquareTable table = {};
    int blocks = 0;
    for (std::size_t i = 0; i <= items.size(); ++i) {
      if (table.count == kMaxFragments || (i == items.size() && table.count > 0)) {
        launch(kernel, blocks, table, static_cast<cudaStream_t>(stream));
        table.count = blocks = 0;
      }
      if (i < items.size() && items[i].dtype == dtype && items[i].numel > 0) {
        table.items[table.count] = items[i];
        table.first_block[table.count++] = blocks;
        blocks = count_blocks(blocks, (items[i].numel + kSquareBlock - 1) / kSquareBlock);
        table.first_block[table.count] = blocks;
      }
    }
  }
}

int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

} // namespace megatron_prune
