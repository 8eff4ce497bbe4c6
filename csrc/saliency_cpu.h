#pragma once

#include "fragments.h"

namespace megatron_prune {

// Row and column sums of every fragment. simd false: base instruction set even where AVX2 and FMA are there.
void reduce_on_cpu(const Reduction &reduction, const std::vector<Fragment> &fragments, bool simd);
void square_add_on_cpu(const std::vector<Square> &items, bool simd);

// "avx2" or "base": what simd = true runs on this machine.
const char *instruction_set();
// Threads a call would use now; 1 without OpenMP.
int num_threads();
bool has_openmp();

} // namespace megatron_prune
