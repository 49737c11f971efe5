// All that a forward pass launches; device_backward.cu has the rest. Two sources, so that two compilers share the kernels.
#include "device.h"
#include "queue.cuh"

namespace slowfast_fast {

void Cuda::forward(const ConvForward& args) {
  cuda::Queue queue(device_);
  cuda::forward(queue, args, nullptr);
}

void Cuda::forward_stats(const ConvForward& args, const BatchStats& stats) {
  cuda::Queue queue(device_);
  cuda::forward(queue, args, &stats);
}

void Cuda::normalise(const Normalise& args) {
  cuda::Queue queue(device_);
  cuda::normalise(queue, args);
}

void Cuda::copy(const CopyRows& args) {
  cuda::Queue queue(device_);
  cuda::copy(queue, args);
}

void Cuda::update_running(const RunningStats& args) {
  cuda::Queue queue(device_);
  cuda::update_running(queue, args);
}

}  // namespace slowfast_fast
