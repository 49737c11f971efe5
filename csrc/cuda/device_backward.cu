#include "device.h"
#include "narrow_instances.cuh"

namespace slowfast_fast {

void Cuda::backward(const ConvBackward& args) {
  cuda::Queue queue(device_);
  cuda::backward(queue, args);
}

void Cuda::normalise_pool_backward(const NormalisePoolBackward& args) {
  cuda::Queue queue(device_);
  cuda::normalise_pool_backward(queue, args);
}

}  // namespace slowfast_fast
