// The primitives as csrc/cuda launches them, on fibers.
#pragma once
#include "cuda/device.h"

namespace slowfast_fast {

class CudaHost {
 public:
  explicit CudaHost(const Tensor&) {}

  void forward(const ConvForward& args);
  static int64_t packed_bytes(const ConvForward& args);
  void pack(const ConvForward& args, void* to);
  void max_pool(const MaxPool& args);
  void pack_pathways(const PackPathways& args);
  void statistics(const RowStatistics& args);
  void normalise_pool(const NormalisePool& args);
  void normalise_pool_backward(const NormalisePoolBackward& args);
  void forward_stats(const ConvForward& args, const BatchStats& stats);
  void normalise(const Normalise& args);
  void backward(const ConvBackward& args);
  static constexpr WeightLayout weight_layout = Cuda::weight_layout;
  static constexpr bool has_spatial = Cuda::has_spatial;
  static bool library_multiplies(const ConvShape& s, Dtype dtype) { return Cuda::library_multiplies(s, dtype); }
  static bool unfolds(const ConvShape& s, Dtype dtype) { return Cuda::unfolds(s, dtype); }
  void bottleneck(const Bottleneck& args);
  void copy(const CopyRows& args);
  void fold(const FoldBatchNorm& args);
  void update_running(const RunningStats& args);
};

}  // namespace slowfast_fast
