// One launch each way: a block per sample and chunk of channels. Forward, the block that arrives
// last adds the partial maps of its sample in their order.
#include "cam/cam.cuh"

namespace camkernels {
namespace cuda {

namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    cam_fwd_kernel(CamForward args, Access of_activations, Access of_gradients) {
  float total;
  make_map<T>(args, of_activations, of_gradients, &total);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    cam_bwd_kernel(CamBackward args, Access of_activations, bool vectors) {
  const int64_t chunks = ceil_div(args.sizes.channels, args.block);
  const int64_t b = blockIdx.x / chunks, first = blockIdx.x % chunks * args.block;
  write_cotangents<T>(args, of_activations, vectors, b, first, MapCotangent(args, b));
}

}  // namespace

int cam_fwd(const CamForward& args, void* stream) {
  const int64_t blocks = args.sizes.batch * chunks_of(args.sizes, args.block);
  const Access of_activations =
      access_of(args.sizes, args.activations, element_bytes(args.activations.dtype));
  const Access of_gradients =
      access_of(args.sizes, args.gradients, element_bytes(args.gradients.dtype));
  int status = 0;
  CAMKERNELS_CUDA_SWITCH(args.activations.dtype,
                         status = launch(cam_fwd_kernel<T>, blocks, kForwardBytes, stream, args,
                                         of_activations, of_gradients));
  return status;
}

int cam_bwd(const CamBackward& args, void* stream) {
  const int64_t blocks = args.sizes.batch * chunks_of(args.sizes, args.block);
  const Access of_activations =
      access_of(args.sizes, args.activations, element_bytes(args.activations.dtype));
  const bool vectors = is_aligned(args.grad_activations);
  int status = 0;
  CAMKERNELS_CUDA_SWITCH(args.grad_dtype, status = launch(cam_bwd_kernel<T>, blocks, kBackwardBytes,
                                                          stream, args, of_activations, vectors));
  return status;
}

}  // namespace cuda
}  // namespace camkernels
