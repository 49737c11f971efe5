// The CPU as a device: csrc/primitives.h carried out by the kernels of the best instruction set, on PyTorch's thread
// pool.
#pragma once
#include <array>
#include <cstddef>
#include <memory>

#include "checks.h"
#include "plan.h"

namespace slowfast_fast {

class Cpu {
 public:
  explicit Cpu(const Tensor& like) : like_(like) {}
  void forward(const ConvForward& args);
  static int64_t packed_bytes(const ConvForward& args);
  void pack(const ConvForward& args, void* to);
  void stem_forward(const StemForward& args);
  void stem_wgrad(const StemWgrad& args);
  static constexpr WeightLayout weight_layout = WeightLayout::Any;  // of a block's temporal convolution
  static constexpr bool has_spatial = true;
  void spatial(const SpatialForward& args);
  // Whether spatial() is faster than oneDNN although it transforms the weight in each call: enough channels for its
  // transforms of images to weigh little, and as many tiles of 2 x 2 outputs as channels for that of the weight.
  static bool multiplies_less(const SpatialForward& args) {
    const SpatialShape& s = args.shape;
    return s.c >= 32 && s.k >= 32 && s.tiles() >= s.c && (args.dtype == Dtype::Float32 || args.dtype == Dtype::Float64);
  }
  void spatial_wgrad(const SpatialWgrad& args);
  static int64_t packed_bytes(const SpatialForward& args);
  void pack(const SpatialForward& args, void* to);
  void max_pool(const MaxPool& args);
  void pack_pathways(const PackPathways& args);
  void normalise_pool(const NormalisePool& args);
  void normalise_pool_backward(const NormalisePoolBackward& args);
  void forward_stats(const ConvForward& args, const BatchStats& stats);
  void statistics(const RowStatistics& args);
  void normalise(const Normalise& args);
  void backward(const ConvBackward& args);
  // Whether PyTorch's product of matrices is the faster one for the products of a pointwise layer: where both sides are
  // wide. Narrow ones it runs at a fraction of the rate of ours, and in 16 bits it rounds between blocks.
  static bool library_multiplies(const ConvShape& s, Dtype dtype) {
    return s.kt == 1 && s.stride == 1 && s.padding == 0 && s.c >= 64 && s.k >= 64 &&
           (dtype == Dtype::Float32 || dtype == Dtype::Float64);
  }
  // Whether tap_products.h is faster than our own gradient of a temporal weight: where both sides are wide, and the
  // weight lies so that each of its taps is a matrix.
  static bool multiplies_taps(const ConvShape& s, Dtype dtype) {
    return s.taps_first && s.kt > 1 && s.stride == 1 && s.t_in == s.t_out && s.c >= 128 && s.k >= 128 &&
           (dtype == Dtype::Float32 || dtype == Dtype::Float64);
  }
  // Whether unfolded.h is faster than oneDNN's gradient of a spatial weight, whose loops run along the rows of an
  // image: many channels, of so few rows that nine of each are no more than a few weights.
  static bool unfolds(const ConvShape& s, Dtype dtype) {
    return s.k >= 256 && s.n * s.t_out * s.p <= 4 * s.k && (dtype == Dtype::Float32 || dtype == Dtype::Float64);
  }
  static constexpr bool has_recomputing = false;  // PyTorch's products of wide layers have no epilogue of ours
  static constexpr bool has_folded_backward = true;
  // Whether folded_backward() is faster than the layer's raw output, computed again: where the products in double of
  // few channels cost less than passes over many, and what is done once a call with K * C * C values is nothing beside
  // what is done for each row.
  static bool folds(const ConvShape& s, Dtype dtype) {
    return dtype == Dtype::Float32 && s.c <= 16 && s.k >= 2 * s.c && s.n * s.t_out * s.p >= 64 * s.c;
  }
  void folded_backward(const FoldedBackward& args);
  void bottleneck(const Bottleneck& args);
  void copy(const CopyRows& args);
  void fold(const FoldBatchNorm& args);
  void update_running(const RunningStats& args);

 private:
  // to[i, c] = the sum over rows of left[i] * x[c], and to[i, norm.c] that of left[i] alone, i < channels; in double.
  static void row_products(const FoldedBackward& norm, const Rows& left, int64_t channels, double* to);
  const Tensor& like_;
};

// On the stack for what a few hundred channels need, where PyTorch's allocator would cost a small call a good part of
// its time.
template <>
class CallMemory<Cpu> {
 public:
  CallMemory(const Tensor&, int64_t bytes)
      : large_(bytes > static_cast<int64_t>(small_.size()) ? new std::byte[static_cast<size_t>(bytes)] : nullptr) {}
  CallMemory(const CallMemory&) = delete;
  void* get() const { return large_ ? large_.get() : small_.data(); }

 private:
  alignas(64) mutable std::array<std::byte, 2048> small_;
  std::unique_ptr<std::byte[]> large_;
};

namespace cpu {
// The kernels in use: the widest instruction set that this processor has, or less if ATEN_CPU_CAPABILITY says so, as
// for PyTorch.
const Kernels& kernels();
}  // namespace cpu
}  // namespace slowfast_fast
