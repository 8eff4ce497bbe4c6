#pragma once

#include <cstddef>

#include "fragments.h"

namespace megatron_prune {

// Device memory, 16-byte aligned, that reduce_on_cuda needs for these fragments.
std::size_t workspace_bytes(const std::vector<Fragment> &fragments);

// Enqueue the row and column sums of every fragment on `stream` (a cudaStream_t). Throws std::runtime_error when CUDA
// refuses a launch, std::invalid_argument when the workspace is too small.
void reduce_on_cuda(const Reduction &reduction, const std::vector<Fragment> &fragments, void *stream, void *workspace,
                    std::size_t size);
void square_add_on_cuda(const std::vector<Square> &items, void *stream);

int runtime_version();

} // namespace megatron_prune
