// The primitives on a CUDA device, on its current stream.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "../checks.h"

namespace slowfast_fast {

namespace cuda {
class Queue;
}

// The primitives as launch.cuh and what it includes launch them. Backing(x) is ready for the device of x for as long as
// it lives; its queue() gives what launch.cuh calls a Queue. device.cuh defines the members.
template <class Backing>
class CudaPrimitives {
 public:
  explicit CudaPrimitives(const Tensor& x) : backing_(x) {}

  static constexpr WeightLayout weight_layout = WeightLayout::Contiguous;  // of a block's temporal convolution
  static constexpr bool has_spatial = false;                               // cuDNN's convolution over images is taken
  void forward(const ConvForward& args);
  static int64_t packed_bytes(const ConvForward& args);
  void pack(const ConvForward& args, void* to);
  void max_pool(const MaxPool& args);
  void pack_pathways(const PackPathways& args);
  void statistics(const RowStatistics& args);
  void normalise_pool(const NormalisePool& args);
  void normalise_pool_backward(const NormalisePoolBackward& args);
  void forward_stats(const ConvForward& args, const BatchStats& stats);
  static constexpr bool has_recomputing = true;
  // Where to multiply anew is cheap beside storing an output and reading it again, which takes as long at some 300
  // input channels on tensor cores; to 512 of them, so that c of every bottleneck is among them. Reckoned, not
  // measured: docs/performance.md.
  static bool recomputes(const ConvShape& s) {
    return s.kt == 1 && s.stride == 1 && s.padding == 0 && 2 * s.c <= s.k && s.c <= 512;
  }
  void forward_normalised(const NormalisedForward& args);
  void normalise(const Normalise& args);
  void backward(const ConvBackward& args);
  // Neither has been measured against PyTorch's products, so all of a block's but its spatial convolution are ours.
  // They round as the convolutions of the network do: a matrix product obeys another setting for TF32, and may add up
  // 16-bit parts.
  static bool library_multiplies(const ConvShape&, Dtype) { return false; }
  // cuDNN's gradient of a spatial weight reads channels_last images as they are; unfolded rows are nine times as many.
  static bool unfolds(const ConvShape&, Dtype) { return false; }
  static bool multiplies_taps(const ConvShape&, Dtype) { return false; }
  // Double would make it slow, and 16 bits inexact, as its parts would be added up in them; not measured either.
  static constexpr bool has_folded_backward = false;
  void bottleneck(const Bottleneck& args);
  void copy(const CopyRows& args);
  void fold(const FoldBatchNorm& args);
  void update_running(const RunningStats& args);

 private:
  // Calls f(queue, cuda::Type<T>{}) with the storage type of dtype.
  template <class F>
  void in_type(Dtype dtype, const F& f);
  Backing backing_;
};

// The device that x is on, made current for the lifetime of this object, and its current stream.
class CurrentStream {
 public:
  explicit CurrentStream(const Tensor& x) : device_(x.device()), guard_(x.get_device_index()) {}
  cuda::Queue queue() const;

 private:
  torch::stable::Device device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

using Cuda = CudaPrimitives<CurrentStream>;
extern template class CudaPrimitives<CurrentStream>;

}  // namespace slowfast_fast
