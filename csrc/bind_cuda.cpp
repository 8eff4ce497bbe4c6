// Python module _C_cuda.
#include "bindings.h"
#include "saliency_cuda.h"

namespace megatron_prune {
namespace {

void run(const Reduction &reduction, const std::vector<Fragment> &fragments, std::uintptr_t stream,
         std::uintptr_t workspace, std::size_t size) {
  const py::gil_scoped_release release;
  reduce_on_cuda(reduction, fragments, reinterpret_cast<void *>(stream), reinterpret_cast<void *>(workspace), size);
}

void score(std::int64_t kind, const py::list &fragments, std::uintptr_t stream, std::uintptr_t workspace,
           std::size_t size) {
  const Reduction reduction = reduction_of_kind(kind);
  run(reduction, score_fragments(fragments, reduction.operation), stream, workspace, size);
}

void wanda_sums(const py::list &fragments, std::uintptr_t stream, std::uintptr_t workspace, std::size_t size) {
  run({Operation::kScaledMagnitude, true, false}, wanda_fragments(fragments), stream, workspace, size);
}

void column_square_sums(const py::list &items, std::uintptr_t stream, std::uintptr_t workspace, std::size_t size) {
  run({Operation::kSquare, true, true}, square_sum_fragments(items), stream, workspace, size);
}

void square_add(const py::list &items, std::uintptr_t stream) {
  const std::vector<Square> parsed = squares(items);
  const py::gil_scoped_release release;
  square_add_on_cuda(parsed, reinterpret_cast<void *>(stream));
}

// Only sizes matter here, so pointers may still be unset: the three tuple forms differ in length.
std::size_t workspace_of(const py::list &items) {
  std::vector<Fragment> fragments;
  for (const py::handle &item : items) {
    const std::size_t length = py::isinstance<py::tuple>(item) ? py::len(item) : 0;
    if (length != 11 && length != 8 && length != 5)
      invalid("workspace_bytes item " + std::to_string(fragments.size()),
              "expected a tuple of score, wanda_sums or column_square_sums");
    const Fields fields(item, "workspace_bytes", fragments.size(), length);
    Fragment fragment;
    if (length == 5) {
      fragment.columns = fields.integer(3);
      check_size(fields.where, "columns", fragment.columns, 1, kMaxColumns);
      check_size(fields.where, "rows", fields.integer(2), 0, kMaxElements / fragment.columns);
      fragment.numel = fields.integer(2) * fragment.columns;
    } else {
      const std::size_t first = length == 11 ? 6 : 2;
      fragment.start = fields.integer(first);
      fragment.numel = fields.integer(first + 1);
      fragment.columns = fields.integer(first + 2);
      check_extent(fields, fragment);
    }
    fragments.push_back(fragment);
  }
  return workspace_bytes(fragments);
}

py::dict info() {
  py::dict result;
  result["archs"] = MEGATRON_PRUNE_ARCHS;
  result["runtime"] = runtime_version();
  return result;
}

} // namespace
} // namespace megatron_prune

PYBIND11_MODULE(_C_cuda, module) {
  namespace mp = megatron_prune;
  namespace py = pybind11;
  module.doc() = "Saliency sums on the GPU; csrc/README.md has the interface.";
  module.def("score", &mp::score, py::arg("kind"), py::arg("fragments"), py::arg("stream"), py::arg("workspace_ptr"),
             py::arg("workspace_bytes"));
  module.def("wanda_sums", &mp::wanda_sums, py::arg("fragments"), py::arg("stream"), py::arg("workspace_ptr"),
             py::arg("workspace_bytes"));
  module.def("column_square_sums", &mp::column_square_sums, py::arg("items"), py::arg("stream"),
             py::arg("workspace_ptr"), py::arg("workspace_bytes"));
  module.def("square_add", &mp::square_add, py::arg("items"), py::arg("stream"));
  module.def("workspace_bytes", &mp::workspace_of, py::arg("items"));
  module.def("info", &mp::info);
}
