// Python module camkernels._cuda: a stream, pointers, sizes and strides in, a cudaError_t out.
// Everything is checked by camkernels/ops/*/cuda.py; the GIL is released while a kernel is
// launched.
#include "cam/cam_arguments.h"
#include "cam_statistics/cam_statistics.h"
#include "common/device.h"
#include "relu/relu.h"
#include "ssim/ssim_device.h"
#include "warped_ssim/warped_ssim_device.h"

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

// What cam_arguments.h binds.
struct Runs {
  template <class... Cam>
  static int cam_fwd(Pointer stream, Pointer arrivals, Cam... cam) {
    CamForward args = cam_forward(cam...);
    args.arrivals = at<int>(arrivals);
    return cuda::cam_fwd(args, at(stream));
  }

  template <class... Cam>
  static int cam_bwd(Pointer stream, Cam... cam) {
    return cuda::cam_bwd(cam_backward(cam...), at(stream));
  }

  template <class... Statistics>
  static int map_statistics_fwd(Pointer stream, Statistics... statistics) {
    return cuda::map_statistics_fwd(statistics_forward(statistics...), at(stream));
  }

  template <class... Statistics>
  static int map_statistics_bwd(Pointer stream, Statistics... statistics) {
    return cuda::map_statistics_bwd(statistics_backward(statistics...), at(stream));
  }

  template <class... Cam>
  static int cam_statistics_fwd(Pointer stream, Pointer arrivals, Pointer total,
                                const Pointers& statistics, Cam... cam) {
    CamStatisticsForward args{cam_forward(cam...), at(total), {}};
    args.cam.arrivals = at<int>(arrivals);
    copy_pointers(statistics, args.statistics);
    return cuda::cam_statistics_fwd(args, at(stream));
  }

  template <class... Cam>
  static int cam_statistics_bwd(Pointer stream, bool relu, const Pointers& statistics,
                                const Pointers& grads, Cam... cam) {
    CamStatisticsBackward args{cam_backward(cam...), relu, {}, {}};
    copy_pointers(statistics, args.statistics);
    copy_pointers(grads, args.grads);
    return cuda::cam_statistics_bwd(args, at(stream));
  }
};

using WindowSizes = std::array<int, 4>;  // lengths and pads, down and across

DeviceWindow device_window(Pointer weights, const WindowSizes& sizes, float c1, float c2) {
  return {at<const float>(weights), sizes[0], sizes[1], sizes[2], sizes[3], c1, c2};
}

int run_ssim_fwd(Pointer stream, const Shape& shape, Pointer x, int x_dtype, const Shape& x_strides,
                 Pointer y, int y_dtype, const Shape& y_strides, Pointer weights,
                 const WindowSizes& window, float c1, float c2, Pointer values, Pointer sums,
                 Pointer arrivals) {
  const SsimDeviceForward args{sizes_of(shape),
                               view_of(x, x_dtype, x_strides),
                               view_of(y, y_dtype, y_strides),
                               device_window(weights, window, c1, c2),
                               at<float>(values),
                               at<float>(sums),
                               at<int>(arrivals)};
  return cuda::ssim_fwd(args, at(stream));
}

int run_ssim_bwd(Pointer stream, const Shape& shape, Pointer x, int x_dtype, const Shape& x_strides,
                 Pointer y, int y_dtype, const Shape& y_strides, Pointer weights,
                 const WindowSizes& window, float c1, float c2, Pointer grad, Pointer grad_x,
                 Pointer grad_y) {
  const SsimDeviceBackward args{sizes_of(shape),
                                view_of(x, x_dtype, x_strides),
                                view_of(y, y_dtype, y_strides),
                                device_window(weights, window, c1, c2),
                                at<const float>(grad),
                                at(grad_x),
                                at(grad_y)};
  return cuda::ssim_bwd(args, at(stream));
}

// sizes: of the maps, via, of the pictures, of the others; outputs as in the struct from sums on.
template <int (*kKernel)(const WarpedSsimDevice&, void*)>
int run_warped_ssim(Pointer stream, int64_t batch, const std::array<int, 8>& sizes, Pointer boxes,
                    Pointer flips, Pointer maps, int maps_dtype, const Shape& maps_strides,
                    Pointer others, int others_dtype, const Shape& others_strides, Pointer weights,
                    const WindowSizes& window, float c1, float c2, Pointer arrivals,
                    const std::array<Pointer, 7>& outputs) {
  WarpedSsimDevice args{};
  args.batch = batch;
  args.map_y = sizes[0], args.map_x = sizes[1];
  args.via_y = sizes[2], args.via_x = sizes[3];
  args.size_y = sizes[4], args.size_x = sizes[5];
  args.other_y = sizes[6], args.other_x = sizes[7];
  args.boxes = at<const int64_t>(boxes);
  args.flips = at<const uint8_t>(flips);
  args.maps = view_of(maps, maps_dtype, maps_strides);
  args.others = view_of(others, others_dtype, others_strides);
  args.window = device_window(weights, window, c1, c2);
  args.arrivals = at<int>(arrivals);
  args.sums = at<float>(outputs[0]);
  args.values = at<float>(outputs[1]);
  args.grad = at<const float>(outputs[2]);
  args.map_sums = at<float>(outputs[3]);
  args.other_sums = at<float>(outputs[4]);
  args.grad_maps = at(outputs[5]);
  args.grad_others = at(outputs[6]);
  return kKernel(args, at(stream));
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
  module.def("ssim_fwd", &run_ssim_fwd, Release());
  module.def("ssim_bwd", &run_ssim_bwd, Release());
  module.def("warped_ssim_fwd", &run_warped_ssim<cuda::warped_ssim_fwd>, Release());
  module.def("warped_ssim_bwd", &run_warped_ssim<cuda::warped_ssim_bwd>, Release());
  define_cam<Runs>(module);
#if defined(CAMKERNELS_HOST)
  void define_host(py::module_&);
  define_host(module);
#endif
}
