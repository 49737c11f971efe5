// BatchNorm's backward behind a pointwise convolution whose output r is stored nowhere: a product forms r as in the
// forward, and its epilogue reads the gradient beside it and leaves sums over rows in place of r.
#pragma once
#include "moments.cuh"
#include "pack.cuh"

namespace slowfast_fast::cuda {

// g = grad where mask > 0. With grad.data == nullptr there is none, and the epilogue is that of a forward.
struct MaskedGradient {
  const void *mean, *invstd;  // (K), of r
  Rows grad, mask;            // without a mask g is grad
  OutRows masked;             // where g goes, or absent
};

// Sums over rows: of g, and of g * xhat with xhat = (r - mean) * invstd.
template <class Acc>
struct GradientSum {
  Acc sum = 0, sum_xhat = 0;

  __device__ void merge(const GradientSum& other) {
    sum += other.sum;
    sum_xhat += other.sum_xhat;
  }
};

// g in adjacent channels of a row.
template <class T, int channels>
struct GradientPack {
  T g[channels], mask[channels];

  __device__ void load(const MaskedGradient& gradient, const Position& at, int64_t first) {
    load_pack(g, row_at<T>(gradient.grad, at) + first);
    if (gradient.mask.data) load_pack(mask, row_at<T>(gradient.mask, at) + first);
  }
  // After it g is past the mask, and where it goes.
  __device__ void finish(const MaskedGradient& gradient, const Position& at, int64_t first) {
    using Acc = Accumulator<T>;
#pragma unroll
    for (int c = 0; c < channels; ++c)  // NaN passes, as in torch's threshold_backward
      if (gradient.mask.data && Acc(mask[c]) <= 0) g[c] = T(0);
    if (gradient.masked.data) store_pack(g, row_at<T>(gradient.masked, at) + first);
  }
};

// The sums of a thread's adjacent channels.
template <int channels, class Acc = float>
class RunningGradientSums {
 public:
  // A row's g, where the convolution's output is r; mean and invstd are of the same channels.
  template <class T>
  __device__ void add(const T (&g)[channels], const Acc (&r)[channels], const Acc* mean, const Acc* invstd) {
#pragma unroll
    for (int c = 0; c < channels; ++c) {
      of_[c].sum += Acc(g[c]);
      of_[c].sum_xhat = fma(Acc(g[c]), (r[c] - mean[c]) * invstd[c], of_[c].sum_xhat);
    }
  }

  __device__ const GradientSum<Acc>& of(int channel) const { return of_[channel]; }

 private:
  GradientSum<Acc> of_[channels];
};

// Over all rows, from those of chunks, (chunks, channels).
template <class Acc>
__global__ void __launch_bounds__(kMergeThreads)
    merge_gradient_sums(MergePlan plan, const GradientSum<Acc>* partial, Acc* sum, Acc* sum_xhat) {
  using Sum = GradientSum<Acc>;
  const Sum all = fold_chunks(plan, partial, [](Sum& a, const Sum& b) { a.merge(b); });
  const int64_t k = plan.channel();
  if (plan.lane() != 0 || k >= plan.channels) return;
  sum[k] = all.sum;
  sum_xhat[k] = all.sum_xhat;
}

}  // namespace slowfast_fast::cuda
