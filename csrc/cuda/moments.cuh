// Per-channel sums and statistics over rows, in two stages: each block leaves the partial result of its chunk of rows,
// a second kernel merges the chunks in their order. No atomics, so the result is the same from run to run.
#pragma once
#include "types.cuh"

namespace slowfast_fast::cuda {

constexpr int kReduceThreads = 256;
constexpr int kLanes = 32;  // channels of a block, adjacent in memory; the other 7 of 8 threads share their rows
constexpr int kRowLanes = kReduceThreads / kLanes;

// Mean and sum of squared deviations from it. Merged as Chan, Golub and LeVeque (1979): never E[x^2] - E[x]^2, which
// cancels.
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

// Those of a thread's channels, value by value as Welford (1962). The count is kept once for all of them: two registers
// for a channel, where sums of deviations from a pivot take three.
template <int channels, class Acc = float>
class RunningMoments {
 public:
  template <class T>
  __device__ void add(const T (&values)[channels]) {
    count_ += 1;
    const Acc share = 1 / count_;
#pragma unroll
    for (int c = 0; c < channels; ++c) {
      const Acc delta = Acc(values[c]) - mean_[c];
      mean_[c] = fma(delta, share, mean_[c]);
      m2_[c] = fma(delta, Acc(values[c]) - mean_[c], m2_[c]);
    }
  }

  __device__ Moments<Acc> of(int channel) const { return {count_, mean_[channel], m2_[channel]}; }

 private:
  Acc count_ = 0, mean_[channels] = {}, m2_[channels] = {};
};

// The channel and the row lane of a thread.
__device__ inline int64_t lane_channel() { return int64_t(blockIdx.x) * kLanes + threadIdx.x % kLanes; }
__device__ inline int row_lane() { return threadIdx.x / kLanes; }

constexpr int kMostBlockValues = 512;

template <class Value>
struct BlockValues {
  Value of[kMostBlockValues];
};

// Thread t < width gets the values of threads t, t + width, t + 2 * width, ... < threads, folded as a tree whose shape
// follows from their number alone. Every thread of the block takes part.
template <class Value, class Fold>
__device__ Value fold_threads(int threads, int width, Value value, const Fold& fold) {
  auto& shared = shared_memory<BlockValues<Value>>();
  const int thread = int(threadIdx.x);
  shared.of[thread] = value;
  for (int rows = threads / width; rows > 1;) {
    const int kept = (rows + 1) / 2;
    __syncthreads();
    if (thread < (rows - kept) * width) {
      fold(value, shared.of[thread + kept * width]);
      shared.of[thread] = value;
    }
    rows = kept;
  }
  __syncthreads();  // before the next fold overwrites what this one reads
  return value;
}

struct Add {
  template <class Value>
  __device__ void operator()(Value& a, const Value& b) const {
    a += b;
  }
};

// The sum over the row lanes of a channel, for row lane 0.
template <class Acc>
__device__ Acc sum_row_lanes(Acc value) {
  return fold_threads(kReduceThreads, kLanes, value, Add());
}

// Merging is latency and little else: as many row lanes as there is use for, each with a few independent loads in
// flight.
constexpr int kMergeThreads = 512;
constexpr int kMergeLoads = 4;
constexpr int kMostMergeLanes = 64;  // leaves 8 adjacent channels, a 32-byte sector of floats
static_assert(kMergeThreads <= kMostBlockValues && kReduceThreads <= kMostBlockValues);

// Of partial results (chunks, channels): a block has `columns` adjacent channels times `lanes` row lanes.
struct MergePlan {
  int64_t chunks, channels;
  int columns, lanes;

  __device__ int64_t channel() const { return int64_t(blockIdx.x) * columns + threadIdx.x % columns; }
  __device__ int lane() const { return threadIdx.x / columns; }
};

inline MergePlan merge_plan(int64_t chunks, int64_t channels) {
  const int lanes = int(std::min<int64_t>(std::max<int64_t>(ceil_div(chunks, kMergeLoads), 1), kMostMergeLanes));
  return {chunks, channels, int(std::min<int64_t>(kMergeThreads / lanes, channels)), lanes};
}

inline Launch merge_launch(const MergePlan& plan, unsigned merges, size_t shared_bytes) {
  return {dim3(unsigned(ceil_div(plan.channels, plan.columns)), merges), unsigned(plan.columns * plan.lanes),
          shared_bytes};
}

// The fold of a channel's chunks, for row lane 0. Every thread of the block takes part.
template <class Value, class Fold>
__device__ Value fold_chunks(const MergePlan& plan, const Value* partial, const Fold& fold) {
  Value value{};
  const int64_t channel = plan.channel();
  if (channel < plan.channels) {
#pragma unroll kMergeLoads
    for (int64_t chunk = plan.lane(); chunk < plan.chunks; chunk += plan.lanes)
      fold(value, partial[chunk * plan.channels + channel]);
  }
  return fold_threads(plan.columns * plan.lanes, plan.columns, value, fold);
}

// to[k] = sum over chunks of from[chunk][k].
template <class Acc>
struct ChunkSum {
  const Acc* from;
  Acc* to;
};

// The second sum, in the blocks of the second row, may be absent; then there is no such row.
template <class Acc>
__global__ void __launch_bounds__(kMergeThreads) sum_chunks(MergePlan plan, ChunkSum<Acc> first, ChunkSum<Acc> second) {
  const Acc sum = fold_chunks(plan, blockIdx.y == 0 ? first.from : second.from, Add());
  if (plan.lane() == 0 && plan.channel() < plan.channels)
    (blockIdx.y == 0 ? first.to : second.to)[plan.channel()] = sum;
}

// The statistics of the batch from those of its chunks, whose means may be distances from `pivot`. Without any row the
// mean and the variances are 0.
template <class Acc>
__global__ void __launch_bounds__(kMergeThreads)
    merge_statistics(MergePlan plan, const Moments<Acc>* partial, const Acc* pivot, int64_t rows, BatchStats out) {
  const auto batch = fold_chunks(plan, partial, [](Moments<Acc>& a, const Moments<Acc>& b) { a.merge(b); });
  const int64_t k = plan.channel();
  if (plan.lane() != 0 || k >= plan.channels) return;
  const Acc biased = rows ? batch.m2 / Acc(rows) : Acc(0);
  static_cast<Acc*>(out.mean)[k] = pivot && rows ? pivot[k] + batch.mean : batch.mean;
  static_cast<Acc*>(out.invstd)[k] = Acc(1) / sqrt(biased + Acc(out.eps));
  static_cast<Acc*>(out.unbiased_var)[k] = rows ? batch.m2 / Acc(rows - 1) : Acc(0);
}

template <class Acc, class Queue>
void launch_merge_statistics(Queue& queue, const Moments<Acc>* partial, int64_t chunks, int64_t channels, int64_t rows,
                             const BatchStats& out, const Acc* pivot = nullptr) {
  const MergePlan plan = merge_plan(chunks, channels);
  queue.launch(merge_statistics<Acc>, merge_launch(plan, 1, sizeof(BlockValues<Moments<Acc>>)), plan, partial, pivot,
               rows, out);
}

}  // namespace slowfast_fast::cuda
