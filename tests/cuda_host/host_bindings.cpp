// What the host build offers the tests beside the kernels.
#include "common/bindings.h"
#include "cuda_runtime.h"
#include "probe.h"

namespace py = pybind11;

void define_host(py::module_& module) {
  module.def("set_order", &cuda_host::set_order, "Order of threads and blocks: 0, 1 (reversed), n");
  module.def("probe", [](const std::string& name, std::uintptr_t in, std::uintptr_t out) {
    return camkernels::cuda::probe(name, camkernels::at<float>(in), camkernels::at<float>(out));
  });
}
