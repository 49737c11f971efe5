// Per-channel sums and statistics over rows, in two stages: each block leaves the partial result of its chunk of rows, a
// second kernel merges the chunks in their order. No atomics, so the result is the same from run to run.
#pragma once
#include "types.cuh"

namespace slowfast_fast::cuda {

constexpr int kReduceThreads = 256;
constexpr int kLanes = 32;  // channels of a block, adjacent in memory; the other 7 of 8 threads share their rows
constexpr int kRowLanes = kReduceThreads / kLanes;

// Mean and sum of squared deviations from it. Merged as Chan, Golub and LeVeque (1979): never E[x^2] - E[x]^2, which cancels.
template <class Acc>
struct Moments {
  Acc count = 0, mean = 0, m2 = 0;

  __device__ void merge(const Moments& other) {
    if (other.count == 0) return;
    const Acc total = count + other.count, delta = other.mean - mean, share = other.count / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * (count * share);
    count = total;
  }
};

// The channel and the row lane of a thread.
__device__ inline int64_t lane_channel() { return int64_t(blockIdx.x) * kLanes + threadIdx.x % kLanes; }
__device__ inline int row_lane() { return threadIdx.x / kLanes; }

template <class Value>
struct BlockValues {
  Value of[kReduceThreads];
};

// Thread t < width gets the values of threads t, t + width, t + 2 * width, ... < threads, folded in this order.
template <class Value, class Fold>
__device__ Value fold_threads(int threads, int width, Value value, const Fold& fold) {
  auto& shared = shared_memory<BlockValues<Value>>();
  shared.of[threadIdx.x] = value;
  __syncthreads();
  if (int(threadIdx.x) < width)
    for (int other = threadIdx.x + width; other < threads; other += width) fold(value, shared.of[other]);
  __syncthreads();  // before the next fold overwrites what this one reads
  return value;
}

// The sum over the row lanes of a channel, for row lane 0.
template <class Acc>
__device__ Acc sum_row_lanes(Acc value) {
  return fold_threads(kReduceThreads, kLanes, value, [](Acc& a, Acc b) { a += b; });
}

// out[k] = sum over chunks of partial[chunk][k].
template <class Acc>
__global__ void __launch_bounds__(kReduceThreads) sum_chunks(const Acc* partial, int64_t chunks, int64_t channels, Acc* out) {
  const int64_t k = lane_channel();
  Acc sum = 0;
  if (k < channels)
    for (int64_t chunk = row_lane(); chunk < chunks; chunk += kRowLanes) sum += partial[chunk * channels + k];
  sum = sum_row_lanes(sum);
  if (row_lane() == 0 && k < channels) out[k] = sum;
}

// The statistics of the batch from those of its chunks. Without any row the mean and the variances are 0.
template <class Acc>
__global__ void __launch_bounds__(kReduceThreads) merge_statistics(const Moments<Acc>* partial, int64_t chunks, int64_t channels,
                                                                    int64_t rows, BatchStats out) {
  const int64_t k = lane_channel();
  Moments<Acc> batch;
  if (k < channels)
    for (int64_t chunk = row_lane(); chunk < chunks; chunk += kRowLanes) batch.merge(partial[chunk * channels + k]);
  batch = fold_threads(kReduceThreads, kLanes, batch, [](Moments<Acc>& a, const Moments<Acc>& b) { a.merge(b); });
  if (row_lane() != 0 || k >= channels) return;
  const Acc biased = rows ? batch.m2 / Acc(rows) : Acc(0);
  static_cast<Acc*>(out.mean)[k] = batch.mean;
  static_cast<Acc*>(out.invstd)[k] = Acc(1) / sqrt(biased + Acc(out.eps));
  static_cast<Acc*>(out.unbiased_var)[k] = rows ? batch.m2 / Acc(rows - 1) : Acc(0);
}

}  // namespace slowfast_fast::cuda
