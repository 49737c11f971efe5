#include "device.h"
#include "queue.cuh"

namespace slowfast_fast {

void Cuda::backward(const ConvBackward& args) {
  cuda::Queue queue(device_);
  cuda::backward(queue, args);
}

}  // namespace slowfast_fast
