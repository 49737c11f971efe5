// How the kernels that treat rows one by one (rowwise.cuh) are cut: packs of channels for threads, runs of rows for
// blocks.
#pragma once
#include "moments.cuh"
#include "pack.cuh"

namespace slowfast_fast::cuda {

constexpr int kRowThreads = 128;
constexpr int kRowLoads = 4;        // rows in flight for a thread that reads one or two tensors
constexpr int kGradientLoads = 2;   // and for one that reads up to three and holds twice the coefficients and sums
constexpr int kRowBlocksPerSM = 3;  // at least: 12 warps, each with 2 KB or more in flight, outlast the latency of HBM
constexpr int64_t kMostRowBlocks = 4096;  // several turns of the largest GPUs: a block reads its coefficients once
static_assert(kRowThreads <= kMostBlockValues);

// Rows as runs of `rows` evenly spaced ones, so that walking along a run takes additions only. A run is the whole
// tensor, a clip or a frame, whichever is the longest that every tensor at hand allows.
struct Runs {
  int64_t rows, count, per_clip;

  // Of the first row of a run.
  __device__ Position start(int64_t run) const { return {run / per_clip, run % per_clip, 0}; }
};

template <class... Tensors>
Runs runs_of(int64_t n, int64_t t, int64_t p, const Tensors&... tensors) {
  const auto frames_join = [&](const auto& rows) { return !rows.data || t == 1 || rows.stride_t == p * rows.stride_p; };
  const auto clips_join = [&](const auto& rows) {
    return !rows.data || n == 1 || rows.stride_n == t * p * rows.stride_p;
  };
  if (!(frames_join(tensors) && ...)) return {p, n * t, t};
  if (!(clips_join(tensors) && ...)) return {t * p, n, 1};
  return {n * t * p, 1, 1};
}

// How the rows and packs of a primitive are dealt out: block (x, y) has chunk x of the rows and the y-th group of
// packs.
struct RowPlan {
  Runs runs;
  Chunks chunks;
  int64_t channels;
  int pack;          // channels of a thread
  int packs, lanes;  // of a block: threads along a row, and rows at a time

  __device__ int64_t channel() const { return (int64_t(blockIdx.y) * packs + threadIdx.x % packs) * pack; }
  __device__ int lane() const { return threadIdx.x / packs; }

  // Calls body(first, rows) for the rows of this thread, `loads` of them at a time: first, first + lanes, ... as far as
  // `rows` of them are left in the run.
  template <int loads, class Body>
  __device__ void walk(const Body& body) const {
    const int64_t end = chunks.end(blockIdx.x);
    for (int64_t row = chunks.begin(blockIdx.x); row < end;) {
      const int64_t run = runs.count == 1 ? 0 : row / runs.rows;
      const int64_t base = run * runs.rows, stop = (end < base + runs.rows ? end : base + runs.rows) - base;
      Position at = runs.start(run);
      for (at.p = row - base + lane(); at.p < stop; at.p += loads * lanes) body(at, stop - at.p);
      row = base + stop;
    }
  }

  // Packs `channel` of the rows that walk's body was called for; what is not there stays as it is.
  template <int loads, class T>
  __device__ void load(Pack<T> (&to)[loads], const Rows& from, const Position& at, int64_t left,
                       int64_t channel) const {
    const T* row = row_at<T>(from, at) + channel;
#pragma unroll
    for (int i = 0; i < loads; ++i)
      if (i * lanes < left) to[i].load(row + i * lanes * from.stride_p);
  }

  template <int loads, class T>
  __device__ void store(const Pack<T> (&from)[loads], const OutRows& to, const Position& at, int64_t left,
                        int64_t channel) const {
    T* row = row_at<T>(to, at) + channel;
#pragma unroll
    for (int i = 0; i < loads; ++i)
      if (i * lanes < left) from[i].store(row + i * lanes * to.stride_p);
  }
};

inline RowPlan row_plan(int pack, const Runs& runs, int64_t channels, int loads, int64_t most_chunks) {
  const int64_t all = channels / pack, packs = ceil_div(all, ceil_div(all, kRowThreads));
  const int64_t lanes = kRowThreads / packs;
  return {runs, cut(runs.rows * runs.count, lanes * loads, most_chunks), channels, pack, int(packs), int(lanes)};
}

inline Launch row_launch(const RowPlan& plan, size_t shared_bytes) {
  const int64_t groups = ceil_div(plan.channels, plan.packs * plan.pack);
  return {dim3(unsigned(plan.chunks.count), unsigned(groups)), unsigned(plan.packs * plan.lanes), shared_bytes};
}

}  // namespace slowfast_fast::cuda
