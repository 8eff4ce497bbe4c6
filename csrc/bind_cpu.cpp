// Python module _C.
#include "bindings.h"
#include "saliency_cpu.h"

namespace megatron_prune {
namespace {

void run(const Reduction &reduction, const std::vector<Fragment> &fragments, bool simd) {
  const py::gil_scoped_release release;
  reduce_on_cpu(reduction, fragments, simd);
}

void score(std::int64_t kind, const py::list &fragments, bool simd) {
  const Reduction reduction = reduction_of_kind(kind);
  run(reduction, score_fragments(fragments, reduction.operation), simd);
}

void wanda_sums(const py::list &fragments, bool simd) {
  run({Operation::kScaledMagnitude, true, false}, wanda_fragments(fragments), simd);
}

void column_square_sums(const py::list &items, bool simd) {
  run({Operation::kSquare, true, true}, square_sum_fragments(items), simd);
}

void square_add(const py::list &items, bool simd) {
  const std::vector<Square> parsed = squares(items);
  const py::gil_scoped_release release;
  square_add_on_cpu(parsed, simd);
}

py::dict info() {
  py::dict result;
  result["isa"] = instruction_set();
  result["openmp"] = has_openmp();
  result["threads"] = num_threads();
  return result;
}

} // namespace
} // namespace megatron_prune

PYBIND11_MODULE(_C, module) {
  namespace mp = megatron_prune;
  namespace py = pybind11;
  module.doc() = "Saliency sums on the CPU; csrc/README.md has the interface.";
  module.def("score", &mp::score, py::arg("kind"), py::arg("fragments"), py::arg("simd") = true);
  module.def("wanda_sums", &mp::wanda_sums, py::arg("fragments"), py::arg("simd") = true);
  module.def("column_square_sums", &mp::column_square_sums, py::arg("items"), py::arg("simd") = true);
  module.def("square_add", &mp::square_add, py::arg("items"), py::arg("simd") = true);
  module.def("info", &mp::info);
}
