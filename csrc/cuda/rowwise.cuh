// The primitives that treat rows one by one, in 16-byte accesses: normalising, the gradient's sums over rows, copying.
// All three are bound by memory. A thread owns one pack of adjacent channels, keeps what it needs of them in registers,
// and strides over rows with several independent loads in flight.
#pragma once
#include "elementwise.cuh"
#include "moments.cuh"
#include "row_plan.cuh"

namespace slowfast_fast::cuda {

// BatchNorm of a pack's channels. BN as in ChannelNorm.
template <class Acc, int size>
struct PackNorm {
  ChannelNorm<Acc> of[size];

  template <class BN>
  __device__ void read(const BN& bn, int64_t channel) {
#pragma unroll
    for (int e = 0; e < size; ++e) of[e] = ChannelNorm<Acc>::of(bn, channel + e);
  }
};

template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSM) normalise_rows(Normalise args, RowPlan plan) {
  using Acc = Accumulator<T>;
  const int64_t channel = plan.channel();
  if (channel >= args.k) return;
  PackNorm<Acc, Pack<T>::kSize> norm;
  norm.read(args, channel);
  plan.walk<kRowLoads>([&](const Position& at, int64_t left) {
    Pack<T> value[kRowLoads], residual[kRowLoads];
    plan.load(value, args.raw, at, left, channel);
    if (args.residual.data) plan.load(residual, args.residual, at, left, channel);
#pragma unroll
    for (int i = 0; i < kRowLoads; ++i) {
      if (i * plan.lanes >= left) break;
#pragma unroll
      for (int e = 0; e < Pack<T>::kSize; ++e) {
        Acc y = norm.of[e](Acc(value[i].of[e]));
        if (args.residual.data) y += Acc(residual[i].of[e]);
        value[i].of[e] = T(args.relu ? relu(y) : y);
      }
    }
    plan.store(value, args.y, at, left, channel);
  });
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSM) copy_rows(CopyRows args, RowPlan plan) {
  const int64_t channel = plan.channel();
  if (channel >= args.c) return;
  plan.walk<kRowLoads>([&](const Position& at, int64_t left) {
    Pack<T> value[kRowLoads];
    plan.load(value, args.from, at, left, channel);
    plan.store(value, args.to, at, left, channel);
  });
}

template <class Acc, int size>
struct PackSums {
  Acc of[size] = {};

  __device__ void operator+=(const PackSums& other) {
    for (int e = 0; e < size; ++e) of[e] += other.of[e];
  }
};

// Leaves a block's sum of the threads' values, (chunks, channels), unless nobody wants it. Every thread takes part.
template <class Acc, int size>
__device__ void leave_sums(const RowPlan& plan, int64_t channel, bool inside, const PackSums<Acc, size>& value,
                           Acc* where) {
  if (!where) return;
  const auto total = fold_threads(plan.packs * plan.lanes, plan.packs, value, Add());
  if (int(threadIdx.x) >= plan.packs || !inside) return;
  for (int e = 0; e < size; ++e) where[int64_t(blockIdx.x) * plan.channels + channel + e] = total.of[e];
}

// As gradient_sums of backward.cuh. The xhat of a row is the gradient's factor in the second sum, and gives the mask.
template <class T, bool kBatchNorm>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSM)
    gradient_sum_rows(ConvBackward args, RowPlan plan, Accumulator<T>* partial, Accumulator<T>* partial_xhat) {
  using Acc = Accumulator<T>;
  constexpr int kSize = Pack<T>::kSize;
  const int64_t channel = plan.channel();
  const bool inside = channel < args.shape.k;
  PackSums<Acc, kSize> sum, sum_xhat;
  if (inside) {
    PackNorm<Acc, kSize> norm;
    if constexpr (kBatchNorm) norm.read(args.bn, channel);
    const bool masks_by_residual = kBatchNorm && args.relu && args.bn.residual.data;
    plan.walk<kGradientLoads>([&](const Position& at, int64_t left) {
      Pack<T> grad[kGradientLoads], output[kGradientLoads], residual[kGradientLoads];
      plan.load(grad, args.grad, at, left, channel);
      if (kBatchNorm || args.relu) plan.load(output, kBatchNorm ? args.bn.raw : args.y, at, left, channel);
      if (masks_by_residual) plan.load(residual, args.bn.residual, at, left, channel);
#pragma unroll
      for (int i = 0; i < kGradientLoads; ++i) {
        if (i * plan.lanes >= left) break;
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          Acc y = Acc(output[i].of[e]);
          const Acc xhat = kBatchNorm ? norm.of[e].xhat(y) : Acc(0);
          if (kBatchNorm) y = norm.of[e](y);
          if (masks_by_residual) y += Acc(residual[i].of[e]);
          if (args.relu && Acc(T(y)) <= 0) grad[i].of[e] = T(0);
          const Acc g = Acc(grad[i].of[e]);
          sum.of[e] += g;
          sum_xhat.of[e] = fma(g, xhat, sum_xhat.of[e]);
        }
      }
      if (args.dresidual.data) plan.store(grad, args.dresidual, at, left, channel);
    });
  }
  leave_sums(plan, channel, inside, sum, partial);
  leave_sums(plan, channel, inside, sum_xhat, partial_xhat);
}

// The mean of a few rows of the first image, far apart: what other rows are measured from. Of one row alone, a mean
// near zero would keep the rounding error of that row's distance.
constexpr int kPivotRows = 8;

template <int kPack, class T, class Acc>
__device__ void load_pivot(Acc (&pivot)[kPack], const T* first, int64_t stride, int64_t rows) {
  const int count = int(rows < kPivotRows ? rows : kPivotRows);
  Acc sum[kPack] = {};
#pragma unroll kPivotRows
  for (int i = 0; i < count; ++i) {
    T value[kPack];
    load_pack(value, first + i * (rows / count) * stride);
#pragma unroll
    for (int e = 0; e < kPack; ++e) sum[e] += Acc(value[e]);
  }
#pragma unroll
  for (int e = 0; e < kPack; ++e) pivot[e] = sum[e] / Acc(count);
}

// The moments of a chunk's rows, (chunks, channels), with means as distances from `pivot`: far from zero a mean in Acc
// would have lost what the chunks differ by.
template <class T, int kPack>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSM)
    statistic_rows(RowStatistics args, RowPlan plan, Moments<Accumulator<T>>* partial, Accumulator<T>* pivot) {
  using Acc = Accumulator<T>;
  const int64_t channel = plan.channel();
  const bool inside = channel < args.k;
  RunningMoments<kPack, Acc> moments;
  if (inside) {
    Acc middle[kPack];
    load_pivot(middle, row_at<T>(args.raw, {0, 0, 0}) + channel, args.raw.stride_p, args.p);
    if (blockIdx.x == 0 && plan.lane() == 0)
      for (int e = 0; e < kPack; ++e) pivot[channel + e] = middle[e];
    plan.walk<kRowLoads>([&](const Position& at, int64_t left) {
      T value[kRowLoads][kPack];
      const T* row = row_at<T>(args.raw, at) + channel;
#pragma unroll
      for (int i = 0; i < kRowLoads; ++i)
        if (i * plan.lanes < left) load_pack(value[i], row + i * plan.lanes * args.raw.stride_p);
#pragma unroll
      for (int i = 0; i < kRowLoads; ++i) {
        if (i * plan.lanes >= left) break;
        Acc distance[kPack];
#pragma unroll
        for (int e = 0; e < kPack; ++e) distance[e] = Acc(value[i][e]) - middle[e];
        moments.add(distance);
      }
    });
  }
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    const auto total = fold_threads(plan.packs * plan.lanes, plan.packs, moments.of(e),
                                    [](Moments<Acc>& a, const Moments<Acc>& b) { a.merge(b); });
    if (int(threadIdx.x) < plan.packs && inside) partial[int64_t(blockIdx.x) * args.k + channel + e] = total;
  }
}

// Whether the kernels of this file take a primitive: nullptr, or why they do not.

template <class T>
const char* why_not_rows(const Normalise& args) {
  return why_not_packs<T>(args.k, args.raw, args.residual, args.y);
}

template <class T>
const char* why_not_rows(const CopyRows& args) {
  return why_not_packs<T>(args.c, args.from, args.to);
}

template <class T>
const char* why_not_rows(const ConvBackward& args) {
  return why_not_packs<T>(args.shape.k, args.grad, args.y, args.bn.raw, args.bn.residual, args.dresidual, args.dconv);
}

template <class T, class Queue>
void statistics_as(Queue& queue, const RowStatistics& args) {
  using Acc = Accumulator<T>;
  const Runs runs = runs_of(args.n, args.t, args.p, args.raw);
  with_pack<T>(
      [&](auto size) {
        constexpr int kPack = decltype(size)::kSize;
        const RowPlan plan = row_plan(kPack, runs, args.k, kRowLoads, kMostPartials);
        auto* partial = queue.template workspace<Moments<Acc>>(plan.chunks.count * args.k);
        auto* pivot = queue.template workspace<Acc>(args.k);
        if (plan.chunks.count > 0)
          queue.launch(statistic_rows<T, kPack>, row_launch(plan, sizeof(BlockValues<Moments<Acc>>)), args, plan,
                       partial, pivot);
        launch_merge_statistics(queue, partial, plan.chunks.count, args.k, args.n * args.t * args.p, args.stats, pivot);
      },
      args.k, args.raw);
}

template <class T, class Queue>
void launch_rows(Queue& queue, const Normalise& args) {
  const Runs runs = runs_of(args.n, args.t, args.p, args.raw, args.residual, args.y);
  const RowPlan plan = row_plan(Pack<T>::kSize, runs, args.k, kRowLoads, kMostRowBlocks);
  queue.launch(normalise_rows<T>, row_launch(plan, 0), args, plan);
}

template <class T, class Queue>
void launch_rows(Queue& queue, const CopyRows& args) {
  const Runs runs = runs_of(args.n, args.t, args.p, args.from, args.to);
  const RowPlan plan = row_plan(Pack<T>::kSize, runs, args.c, kRowLoads, kMostRowBlocks);
  queue.launch(copy_rows<T>, row_launch(plan, 0), args, plan);
}

template <class T>
RowPlan gradient_plan(const ConvBackward& args) {
  const ConvShape& s = args.shape;
  const Runs runs =
      runs_of(s.n, s.t_out, s.p, args.grad, args.y, args.bn.raw, args.bn.residual, args.dresidual, args.dconv);
  return row_plan(Pack<T>::kSize, runs, s.k, kGradientLoads, kMostPartials);
}

template <class T, class Queue>
void launch_gradient_rows(Queue& queue, const ConvBackward& args, const RowPlan& plan, Accumulator<T>* partial,
                          Accumulator<T>* partial_xhat) {
  const auto kernel = args.bn.raw.data ? gradient_sum_rows<T, true> : gradient_sum_rows<T, false>;
  const size_t shared_bytes = sizeof(BlockValues<PackSums<Accumulator<T>, Pack<T>::kSize>>);
  queue.launch(kernel, row_launch(plan, shared_bytes), args, plan, partial, partial_xhat);
}

}  // namespace slowfast_fast::cuda
