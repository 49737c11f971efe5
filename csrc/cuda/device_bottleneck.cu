#include "bottleneck_launch.cuh"
#include "device.h"
#include "queue.cuh"

namespace slowfast_fast {

void Cuda::bottleneck(const Bottleneck& args) {
  cuda::Queue queue(device_);
  cuda::bottleneck::run(queue, args);
}

}  // namespace slowfast_fast

// What bottleneck_launch.cuh says of a block, for Python; asks nothing of a device.
extern "C" __attribute__((visibility("default"))) const char* slowfast_fast_cuda_bottleneck(int64_t c, int64_t j,
                                                                                            int64_t k, int dtype,
                                                                                            bool tf32, bool aligned) {
  return slowfast_fast::cuda::bottleneck::explain(c, j, k, static_cast<slowfast_fast::Dtype>(dtype), tf32, aligned);
}
