#include "instances.cuh"

namespace slowfast_fast::cuda::bottleneck {

template void run(Queue&, const Bottleneck&);

}  // namespace slowfast_fast::cuda::bottleneck

// What bottleneck_launch.cuh says of a block, for Python; asks nothing of a device.
extern "C" __attribute__((visibility("default"))) const char* slowfast_fast_cuda_bottleneck(int64_t c, int64_t j,
                                                                                            int64_t k, int dtype,
                                                                                            bool tf32, bool aligned) {
  return slowfast_fast::cuda::bottleneck::explain(c, j, k, static_cast<slowfast_fast::Dtype>(dtype), tf32, aligned);
}
