// All that a forward pass launches; device_backward.cu has the rest. Two sources, so that two compilers share the
// kernels.
#include "device.h"
#include "explain.cuh"
#include "narrow_instances.cuh"

namespace slowfast_fast {

void Cuda::forward(const ConvForward& args) {
  cuda::Queue queue(device_);
  cuda::forward(queue, args, nullptr);
}

int64_t Cuda::packed_bytes(const ConvForward& args) { return cuda::packed_bytes(args); }

void Cuda::pack(const ConvForward& args, void* to) {
  cuda::Queue queue(device_);
  cuda::pack(queue, args, to);
}

void Cuda::max_pool(const MaxPool& args) {
  cuda::Queue queue(device_);
  cuda::max_pool(queue, args);
}

void Cuda::pack_pathways(const PackPathways& args) {
  cuda::Queue queue(device_);
  cuda::pack_pathways(queue, args);
}

void Cuda::statistics(const RowStatistics& args) {
  cuda::Queue queue(device_);
  cuda::statistics(queue, args);
}

void Cuda::normalise_pool(const NormalisePool& args) {
  cuda::Queue queue(device_);
  cuda::normalise_pool(queue, args);
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

void Cuda::fold(const FoldBatchNorm& args) {
  cuda::Queue queue(device_);
  cuda::fold(queue, args);
}

void Cuda::update_running(const RunningStats& args) {
  cuda::Queue queue(device_);
  cuda::update_running(queue, args);
}

}  // namespace slowfast_fast

// What explain.cuh says of a convolution, for Python; asks nothing of a device. shape: the members of ConvShape, in
// their order. The text is the thread's, until its next call.
extern "C" __attribute__((visibility("default"))) const char* slowfast_fast_cuda_kernels(const int64_t* shape,
                                                                                         int dtype, bool tf32,
                                                                                         bool aligned) {
  static thread_local std::string text;
  const slowfast_fast::ConvShape s{shape[0], shape[1], shape[2], shape[3], shape[4],
                                   shape[5], shape[6], shape[7], shape[8], shape[9]};
  text = slowfast_fast::cuda::explain(s, static_cast<slowfast_fast::Dtype>(dtype), tf32, aligned);
  return text.c_str();
}
