// Python module camkernels._cuda: a stream, pointers, sizes and strides in, a cudaError_t out.
// Everything is checked by camkernels/ops/*/cuda.py; the GIL is released while a kernel is
// launched.
#include "cam/cam_arguments.h"
#include "cam_statistics/cam_statistics.h"
#include "common/device.h"
#include "relu/relu.h"

namespace camkernels {

namespace {

int run_relu_fwd(Pointer stream, Pointer input, Pointer output, Pointer mask, int64_t count,
                 int dtype) {
  const ReluForward args{at(input), at(output), at<uint8_t>(mask), count, dtype, false, 1};
  return cuda::relu_fwd(args, at(stream));
}

int run_relu_bwd(Pointer stream, Pointer grad, Pointer mask, Pointer output, Pointer grad_input,
                 int64_t count, int dtype, bool guided) {
  const ReluBackward args{
      at(grad), at<uint8_t>(mask), at(output), at(grad_input), count, dtype, guided, false, 1};
  return cuda::relu_bwd(args, at(stream));
}

template <class... Cam>
int run_cam_fwd(Pointer stream, Pointer arrivals, Cam... cam) {
  CamForward args = cam_forward(cam...);
  args.arrivals = at<int>(arrivals);
  return cuda::cam_fwd(args, at(stream));
}

template <class... Cam>
int run_cam_bwd(Pointer stream, Cam... cam) {
  return cuda::cam_bwd(cam_backward(cam...), at(stream));
}

template <class... Statistics>
int run_map_statistics_fwd(Pointer stream, Statistics... statistics) {
  return cuda::map_statistics_fwd(statistics_forward(statistics...), at(stream));
}

template <class... Statistics>
int run_map_statistics_bwd(Pointer stream, Statistics... statistics) {
  return cuda::map_statistics_bwd(statistics_backward(statistics...), at(stream));
}

template <class... Cam>
int run_cam_statistics_fwd(Pointer stream, Pointer arrivals, Pointer total,
                           const Pointers& statistics, Cam... cam) {
  CamStatisticsForward args{cam_forward(cam...), at(total), {}};
  args.cam.arrivals = at<int>(arrivals);
  copy_pointers(statistics, args.statistics);
  return cuda::cam_statistics_fwd(args, at(stream));
}

template <class... Cam>
int run_cam_statistics_bwd(Pointer stream, bool relu, const Pointers& statistics,
                           const Pointers& grads, Cam... cam) {
  CamStatisticsBackward args{cam_backward(cam...), relu, {}, {}};
  copy_pointers(statistics, args.statistics);
  copy_pointers(grads, args.grads);
  return cuda::cam_statistics_bwd(args, at(stream));
}

// Deduces the arguments for the templates above.
template <class Arguments, class... Given>
void define_by(py::module_& module, Arguments (*)(Given...)) {
  if constexpr (std::is_same_v<Arguments, CamForward>) {
    module.def("cam_fwd", &run_cam_fwd<Given...>, Release());
    module.def("cam_statistics_fwd", &run_cam_statistics_fwd<Given...>, Release());
  } else if constexpr (std::is_same_v<Arguments, CamBackward>) {
    module.def("cam_bwd", &run_cam_bwd<Given...>, Release());
    module.def("cam_statistics_bwd", &run_cam_statistics_bwd<Given...>, Release());
  } else if constexpr (std::is_same_v<Arguments, StatisticsForward>) {
    module.def("map_statistics_fwd", &run_map_statistics_fwd<Given...>, Release());
  } else {
    module.def("map_statistics_bwd", &run_map_statistics_bwd<Given...>, Release());
  }
}

}  // namespace
}  // namespace camkernels

PYBIND11_MODULE(_cuda, module) {
  using namespace camkernels;
  module.doc() = "CUDA kernels; called by camkernels.ops.*.cuda. Imports without a GPU.";
#if defined(CAMKERNELS_CUDA_ARCHS)
  module.attr("archs") = CAMKERNELS_CUDA_ARCHS;
#else
  module.attr("archs") = "host";
#endif
  module.def("error_name", &cuda::error_name);
  module.def("error_text", &cuda::error_text);
  module.def("versions", [] {
    const cuda::Versions found = cuda::versions();
    return py::make_tuple(found.driver, found.runtime);
  });
  module.def("device_status", &cuda::device_status);
  module.def("launches", &cuda::launches);

  module.def("relu_fwd", &run_relu_fwd, Release());
  module.def("relu_bwd", &run_relu_bwd, Release());
  define_by(module, &cam_forward);
  define_by(module, &cam_backward);
  define_by(module, &statistics_forward);
  define_by(module, &statistics_backward);
#if defined(CAMKERNELS_HOST)
  void define_host(py::module_&);
  define_host(module);
#endif
}
