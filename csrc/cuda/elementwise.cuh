// Kernels that treat every element alike: normalising, copying, running statistics.
#pragma once
#include "types.cuh"

namespace slowfast_fast::cuda {

constexpr int kElementThreads = 256;

// What BatchNorm does to one channel. BN is a Normalise or the bn of a ConvBackward.
template <class Acc>
struct ChannelNorm {
  Acc mean, invstd, gamma, beta;

  template <class BN>
  __device__ static ChannelNorm of(const BN& bn, int64_t k) {
    return {static_cast<const Acc*>(bn.mean)[k], static_cast<const Acc*>(bn.invstd)[k], channel_or(bn.gamma, k, Acc(1)),
            channel_or(bn.beta, k, Acc(0))};
  }

  __device__ Acc xhat(Acc raw) const { return (raw - mean) * invstd; }

  // BatchNorm's result before residual and activation. The backward repeats it for the ReLU mask and must get the same
  // bits, so the one multiply-add is spelled out instead of being left to the compiler.
  __device__ Acc operator()(Acc raw) const { return fma(xhat(raw), gamma, beta); }
};

template <class T, class BN>
__device__ Accumulator<T> xhat(const BN& bn, const Position& at, int64_t k) {
  using Acc = Accumulator<T>;
  const ChannelNorm<Acc> norm{static_cast<const Acc*>(bn.mean)[k], static_cast<const Acc*>(bn.invstd)[k], 1, 0};
  return norm.xhat(Acc(row_at<T>(bn.raw, at)[k]));
}

template <class T, class BN>
__device__ Accumulator<T> normalised(const BN& bn, const Position& at, int64_t k) {
  using Acc = Accumulator<T>;
  const Acc value = ChannelNorm<Acc>::of(bn, k)(Acc(row_at<T>(bn.raw, at)[k]));
  return bn.residual.data ? value + Acc(row_at<T>(bn.residual, at)[k]) : value;
}

// First element and step of this thread in a grid-stride loop.
__device__ inline int64_t first_element() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t element_step() { return int64_t(gridDim.x) * blockDim.x; }

// Of a loop over tiles or elements; a block that gets several takes them in turn.
constexpr int64_t kMostBlocks = 65536;

inline Launch element_launch(int64_t elements) {
  return {dim3(unsigned(std::min(ceil_div(elements, kElementThreads), kMostBlocks))), kElementThreads, 0};
}

template <class T>
__global__ void __launch_bounds__(kElementThreads) normalise_kernel(Normalise args) {
  const int64_t elements = args.n * args.t * args.p * args.k;
  for (int64_t i = first_element(); i < elements; i += element_step()) {
    const Position at = position_of(i / args.k, args.t, args.p);
    const int64_t k = i % args.k;
    const auto value = normalised<T>(args, at, k);
    row_at<T>(args.y, at)[k] = T(args.relu ? relu(value) : value);
  }
}

template <class T>
__global__ void __launch_bounds__(kElementThreads) copy_kernel(CopyRows args) {
  const int64_t elements = args.n * args.t * args.p * args.c;
  for (int64_t i = first_element(); i < elements; i += element_step()) {
    const Position at = position_of(i / args.c, args.t, args.p);
    row_at<T>(args.to, at)[i % args.c] = row_at<T>(args.from, at)[i % args.c];
  }
}

template <class Acc>
__global__ void __launch_bounds__(kElementThreads) fold_kernel(FoldBatchNorm args) {
  const int64_t k = first_element();
  if (k >= args.k) return;
  const Acc invstd = Acc(1) / sqrt(static_cast<const Acc*>(args.var)[k] + Acc(args.eps));
  const Acc scale = channel_or(args.gamma, k, Acc(1)) * invstd;
  static_cast<Acc*>(args.scale)[k] = scale;
  static_cast<Acc*>(args.shift)[k] =
      fma(-static_cast<const Acc*>(args.mean)[k], scale, channel_or(args.beta, k, Acc(0)));
}

// One block: every thread needs the count that one of them advances. T is the running statistics' type.
template <class T>
__global__ void __launch_bounds__(kElementThreads) update_running_kernel(RunningStats args) {
  double& factor = shared_memory<double>();
  if (threadIdx.x == 0) {
    if (args.num_batches_tracked) ++*args.num_batches_tracked;
    factor = args.cumulative ? 1.0 / double(*args.num_batches_tracked) : args.momentum;
  }
  __syncthreads();
  const auto update = [&](void* running, const void* batch) {
    if (!running) return;
    for (int64_t k = threadIdx.x; k < args.k; k += blockDim.x) {
      const double value =
          args.batch_is_double ? static_cast<const double*>(batch)[k] : double(static_cast<const float*>(batch)[k]);
      T& average = static_cast<T*>(running)[k];
      average = T(Accumulator<T>((1.0 - factor) * double(average) + factor * value));
    }
  };
  update(args.running_mean, args.mean);
  update(args.running_var, args.unbiased_var);
}

}  // namespace slowfast_fast::cuda
