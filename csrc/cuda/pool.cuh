// Max pooling over H and W, as it is or with BatchNorm and ReLU on the way, and the backward of the latter. A thread
// owns 16 bytes of adjacent channels where rows allow it, else one channel. No indices are kept: the backward finds
// each window's maximum again.
#pragma once
#include "rowwise.cuh"

namespace slowfast_fast::cuda {

// Whether b is to replace a as the maximum: the first one stays, and the last NaN wins, as in torch.
template <class Acc>
__device__ bool replaces(Acc b, Acc a) {
  return b > a || b != b;
}

// Calls body(values, place) for kPack channels of every position of window `at` that is inside of the image, row by
// row; `place` counts outside ones too.
template <class T, int kPack, class Body>
__device__ void for_window(const MaxPool& pool, const Position& at, int64_t channel, const Body& body) {
  const int64_t top = at.p / pool.w_out * pool.stride - pool.padding,
                left = at.p % pool.w_out * pool.stride - pool.padding;
  const int64_t h0 = top < 0 ? 0 : top, h1 = top + pool.kernel < pool.h_in ? top + pool.kernel : pool.h_in;
  const int64_t w0 = left < 0 ? 0 : left, w1 = left + pool.kernel < pool.w_in ? left + pool.kernel : pool.w_in;
  for (int64_t h = h0; h < h1; ++h)
    for (int64_t w = w0; w < w1; ++w) {
      T values[kPack];
      load_pack(values, row_at<T>(pool.x, {at.n, at.t, h * pool.w_in + w}) + channel);
      body(values, (h - top) * pool.kernel + w - left);
    }
}

// Calls body(at) for the rows of this thread, of images of `positions` rows.
template <class Body>
__device__ void for_rows(const RowPlan& plan, int64_t frames, int64_t positions, const Body& body) {
  const int64_t end = plan.chunks.end(blockIdx.x);
  for (int64_t row = plan.chunks.begin(blockIdx.x) + plan.lane(); row < end; row += plan.lanes)
    body(position_of(row, frames, positions));
}

template <class T, int kPack, bool kNormalises>
__global__ void __launch_bounds__(kRowThreads) pool_rows(NormalisePool args, RowPlan plan) {
  using Acc = Accumulator<T>;
  const MaxPool& pool = args.pool;
  const int64_t channel = plan.channel();
  if (channel >= pool.c) return;
  PackNorm<Acc, kPack> norm;
  if constexpr (kNormalises) norm.read(args, channel);
  for_rows(plan, pool.t, pool.h_out * pool.w_out, [&](const Position& at) {
    Acc most[kPack];
    for (Acc& value : most) value = Acc(-INFINITY);
    for_window<T, kPack>(pool, at, channel, [&](const T(&values)[kPack], int64_t) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const Acc value = kNormalises ? norm.of[e](Acc(values[e])) : Acc(values[e]);
        if (replaces(value, most[e])) most[e] = value;
      }
    });
    T stored[kPack];
#pragma unroll
    for (int e = 0; e < kPack; ++e) stored[e] = T(kNormalises && args.relu ? relu(most[e]) : most[e]);
    store_pack(stored, row_at<T>(pool.y, at) + channel);
  });
}

// A place that stands for none: the ReLU lets no gradient pass.
constexpr uint8_t kNoPlace = most_window;

// The windows' part in the backward: each one's place of its maximum, (N, T, H', W', C), and a chunk's sums of the
// gradient past the ReLU and of it times xhat, as gradient_sum_rows leaves them.
template <class T, int kPack>
__global__ void __launch_bounds__(kRowThreads)
    pool_gradient_sums(NormalisePoolBackward args, RowPlan plan, uint8_t* place, Accumulator<T>* partial,
                       Accumulator<T>* partial_xhat) {
  using Acc = Accumulator<T>;
  const MaxPool& pool = args.forward.pool;
  const int64_t channel = plan.channel(), positions = pool.h_out * pool.w_out;
  const bool inside = channel < pool.c;
  PackSums<Acc, kPack> sum, sum_xhat;
  if (inside) {
    PackNorm<Acc, kPack> norm;
    norm.read(args.forward, channel);
    for_rows(plan, pool.t, positions, [&](const Position& at) {
      Acc most[kPack], xhat[kPack] = {};
      uint8_t where[kPack] = {};
      for (Acc& value : most) value = Acc(-INFINITY);
      for_window<T, kPack>(pool, at, channel, [&](const T(&values)[kPack], int64_t place_in_window) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          const Acc value = norm.of[e](Acc(values[e]));
          if (!replaces(value, most[e])) continue;
          most[e] = value;
          xhat[e] = norm.of[e].xhat(Acc(values[e]));
          where[e] = uint8_t(place_in_window);
        }
      });
      T grad[kPack];
      load_pack(grad, row_at<T>(args.grad, at) + channel);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const bool stopped = args.forward.relu && Acc(T(most[e])) <= 0;
        if (stopped) where[e] = kNoPlace;
        const Acc g = stopped ? Acc(0) : Acc(grad[e]);
        sum.of[e] += g;
        sum_xhat.of[e] = fma(g, xhat[e], sum_xhat.of[e]);
      }
      store_pack(where, place + ((at.n * pool.t + at.t) * positions + at.p) * pool.c + channel);
    });
  }
  leave_sums(plan, channel, inside, sum, partial);
  leave_sums(plan, channel, inside, sum_xhat, partial_xhat);
}

// The gradient of x from what the windows that see a position have there. sum and sum_xhat: (C).
template <class T, int kPack>
__global__ void __launch_bounds__(kRowThreads)
    pool_gradient(NormalisePoolBackward args, RowPlan plan, const uint8_t* place, const Accumulator<T>* sum,
                  const Accumulator<T>* sum_xhat) {
  using Acc = Accumulator<T>;
  const MaxPool& pool = args.forward.pool;
  const int64_t channel = plan.channel(), positions = pool.h_in * pool.w_in;
  if (channel >= pool.c) return;
  PackNorm<Acc, kPack> norm;
  norm.read(args.forward, channel);
  Acc mean[kPack], mean_xhat[kPack];
  const Acc inverse_rows = Acc(1) / Acc(pool.n * pool.t * positions);
  for (int e = 0; e < kPack; ++e) {
    mean[e] = sum[channel + e] * inverse_rows;
    mean_xhat[e] = sum_xhat[channel + e] * inverse_rows;
  }
  for_rows(plan, pool.t, positions, [&](const Position& at) {
    const int64_t h = at.p / pool.w_in + pool.padding, w = at.p % pool.w_in + pool.padding;
    const int64_t i0 = h < pool.kernel ? 0 : (h - pool.kernel) / pool.stride + 1;
    const int64_t j0 = w < pool.kernel ? 0 : (w - pool.kernel) / pool.stride + 1;
    Acc g[kPack] = {};
    for (int64_t i = i0; i < pool.h_out && i * pool.stride <= h; ++i)
      for (int64_t j = j0; j < pool.w_out && j * pool.stride <= w; ++j) {
        const Position window{at.n, at.t, i * pool.w_out + j};
        const int64_t own = (h - i * pool.stride) * pool.kernel + w - j * pool.stride;
        uint8_t where[kPack];
        T grad[kPack];
        load_pack(where, place + ((at.n * pool.t + at.t) * pool.h_out * pool.w_out + window.p) * pool.c + channel);
        load_pack(grad, row_at<T>(args.grad, window) + channel);
#pragma unroll
        for (int e = 0; e < kPack; ++e)
          if (where[e] == own) g[e] += Acc(grad[e]);
      }
    T values[kPack];
    load_pack(values, row_at<T>(pool.x, at) + channel);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const Acc centred = g[e] - mean[e] - norm.of[e].xhat(Acc(values[e])) * mean_xhat[e];
      values[e] = T(centred * (norm.of[e].invstd * norm.of[e].gamma));
    }
    store_pack(values, row_at<T>(args.dx, at) + channel);
  });
}

template <class T, bool kNormalises, class Queue>
void launch_pool(Queue& queue, const NormalisePool& args) {
  const MaxPool& pool = args.pool;
  const int64_t rows = pool.n * pool.t * pool.h_out * pool.w_out;
  if (rows == 0) return;
  with_pack<T>(
      [&](auto size) {
        constexpr int kPack = decltype(size)::kSize;
        const RowPlan plan = row_plan(kPack, {rows, 1, 1}, pool.c, 1, kMostRowBlocks);
        queue.launch(pool_rows<T, kPack, kNormalises>, row_launch(plan, 0), args, plan);
      },
      pool.c, pool.x, pool.y);
}

template <class T, class Queue>
void max_pool_as(Queue& queue, const MaxPool& args) {
  launch_pool<T, false>(queue, NormalisePool{args});
}

template <class T, class Queue>
void normalise_pool_as(Queue& queue, const NormalisePool& args) {
  launch_pool<T, true>(queue, args);
}

template <class T, class Queue>
void normalise_pool_backward_as(Queue& queue, const NormalisePoolBackward& args) {
  using Acc = Accumulator<T>;
  const MaxPool& pool = args.forward.pool;
  const int64_t frames = pool.n * pool.t, windows = frames * pool.h_out * pool.w_out;
  auto* sum = args.dbeta ? static_cast<Acc*>(args.dbeta) : queue.template workspace<Acc>(pool.c);
  auto* sum_xhat = args.dgamma ? static_cast<Acc*>(args.dgamma) : queue.template workspace<Acc>(pool.c);
  with_pack<T>(
      [&](auto size) {
        constexpr int kPack = decltype(size)::kSize;
        const RowPlan plan = row_plan(kPack, {windows, 1, 1}, pool.c, 1, kMostPartials);
        auto* place = queue.template workspace<uint8_t>(windows * pool.c);
        Acc* partial = queue.template workspace<Acc>(plan.chunks.count * pool.c);
        Acc* partial_xhat = queue.template workspace<Acc>(plan.chunks.count * pool.c);
        if (windows > 0)
          queue.launch(pool_gradient_sums<T, kPack>, row_launch(plan, sizeof(BlockValues<PackSums<Acc, kPack>>)), args,
                       plan, place, partial, partial_xhat);
        const MergePlan merge = merge_plan(plan.chunks.count, pool.c);
        queue.launch(sum_chunks<Acc>, merge_launch(merge, 2, sizeof(BlockValues<Acc>)), merge,
                     ChunkSum<Acc>{partial, sum}, ChunkSum<Acc>{partial_xhat, sum_xhat});
        if (!args.dx.data || windows == 0) return;
        const RowPlan rows = row_plan(kPack, {frames * pool.h_in * pool.w_in, 1, 1}, pool.c, 1, kMostRowBlocks);
        queue.launch(pool_gradient<T, kPack>, row_launch(rows, 0), args, rows, place, sum, sum_xhat);
      },
      pool.c, pool.x, args.grad, args.dx);
}

}  // namespace slowfast_fast::cuda
