// All that instances.cuh does not leave to other sources.
#include "device.cuh"
#include "explain.cuh"
#include "instances.cuh"

namespace slowfast_fast {

namespace cuda {
template void forward(Queue&, const ConvForward&, const BatchStats*);
template void sum_gradient(Queue&, const ConvBackward&, void*, void*);
}  // namespace cuda

cuda::Queue CurrentStream::queue() const { return cuda::Queue(device_); }

template class CudaPrimitives<CurrentStream>;

}  // namespace slowfast_fast

// What explain.cuh says of a convolution, for Python; asks nothing of a device.
extern "C" __attribute__((visibility("default"))) const char* slowfast_fast_cuda_kernels(const int64_t* shape,
                                                                                         int dtype, bool tf32,
                                                                                         bool aligned) {
  return slowfast_fast::cuda::explain(shape, dtype, tf32, aligned);
}
