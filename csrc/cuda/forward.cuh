// The convolution with its epilogue, with the statistics of its output, and with the sums of a gradient beside it.
#pragma once
#include "masked_gradient.cuh"
#include "operands.cuh"
#include "product.cuh"

namespace slowfast_fast::cuda {

template <class Acc>
struct ForwardShared {
  Tiles<Acc> tiles;
  Acc columns[kThreadRows][kTile];  // what the 16 threads of a column have of it
  Acc mean[kTile];
};

// Sums value(i, j) over the rows of a tile; thread c < kTile gets the sum of column c. The next call must be a barrier
// away.
template <class Acc, class Value>
__device__ Acc sum_columns(ForwardShared<Acc>& shared, const Value& value) {
  for (int j = 0; j < kPerThread; ++j) {
    Acc sum = 0;
    for (int i = 0; i < kPerThread; ++i) sum += value(i, j);
    shared.columns[threadIdx.x / kThreadRows][tile_column(j)] = sum;
  }
  __syncthreads();
  Acc sum = 0;
  if (threadIdx.x < kTile)
    for (const auto& part : shared.columns) sum += part[threadIdx.x];
  return sum;
}

// The moments of column c of a tile of `rows` rows, for thread c < kTile. The deviations are taken from the tile's own
// mean.
template <class Acc>
__device__ Moments<Acc> column_moments(ForwardShared<Acc>& shared, const Acc (&value)[kPerThread][kPerThread],
                                       int64_t rows) {
  Moments<Acc> moments;
  moments.count = Acc(rows);
  moments.mean =
      sum_columns(shared, [&](int i, int j) { return tile_row(i) < rows ? value[i][j] : Acc(0); }) / Acc(rows);
  if (threadIdx.x < kTile) shared.mean[threadIdx.x] = moments.mean;
  __syncthreads();
  moments.m2 = sum_columns(shared, [&](int i, int j) {
    const Acc deviation = value[i][j] - shared.mean[tile_column(j)];
    return tile_row(i) < rows ? deviation * deviation : Acc(0);
  });
  return moments;
}

// One block per chunk of output rows and (grid-stride) tile of output channels, which begins with k0. Down its chunk
// the block makes tiles of `value`, each of them for use(gathered, value, row0, end, k0), then leave(gathered, k0).
template <class T, class Gathered, class Use, class Leave>
__device__ void walk_tiles(ForwardShared<Accumulator<T>>& shared, const ConvForward& args, const Chunks& chunks,
                           const Use& use, const Leave& leave) {
  const ConvShape& s = args.shape;
  const Window<T> x{s, args.x};
  const ForwardWeight<T> weight{s, static_cast<const T*>(args.weight)};
  const int64_t end = chunks.end(blockIdx.x);
  for (int64_t k0 = int64_t(blockIdx.y) * kTile; k0 < s.k; k0 += int64_t(gridDim.y) * kTile) {
    Gathered gathered;
    for (int64_t row0 = chunks.begin(blockIdx.x); row0 < end; row0 += kTile) {
      Accumulator<T> value[kPerThread][kPerThread];
      multiply_tile(shared.tiles, x, weight, {row0, end}, {k0, s.k}, {0, s.kt * s.c}, value);
      use(gathered, value, row0, end, k0);
    }
    leave(gathered, k0);
  }
}

// Calls use(i, j, position, k) for this thread's results of a tile, as far as there are rows and channels.
template <class Use>
__device__ void for_results(const ConvShape& s, int64_t row0, int64_t end, int64_t k0, const Use& use) {
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t row = row0 + tile_row(i);
    if (row >= end) continue;
    const Position at = position_of(row, s.t_out, s.p);
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t k = k0 + tile_column(j);
      if (k < s.k) use(i, j, at, k);
    }
  }
}

// With `partial`, (chunks, K), it also leaves the moments of what it stored, after the rounding to T; without a y, of
// what it would have stored, before it.
template <class T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(ConvForward args, Chunks chunks, Moments<Accumulator<T>>* partial) {
  using Acc = Accumulator<T>;
  using Values = Acc[kPerThread][kPerThread];
  const ConvShape& s = args.shape;
  auto& shared = shared_memory<ForwardShared<Acc>>();
  walk_tiles<T, Moments<Acc>>(
      shared, args, chunks,
      [&](Moments<Acc>& moments, Values& value, int64_t row0, int64_t end, int64_t k0) {
        for_results(s, row0, end, k0, [&](int i, int j, const Position& at, int64_t k) {
          const Acc centred = value[i][j] - channel_or(args.centre, k, Acc(0));
          Acc y = fma(centred, channel_or(args.scale, k, Acc(1)), channel_or(args.shift, k, Acc(0)));
          if (args.residual.data)
            y = fma(Acc(row_at<T>(args.residual, at)[k]), channel_or(args.residual_scale, k, Acc(1)), y);
          if (!args.y.data) return;
          const T stored = T(args.relu ? relu(y) : y);
          row_at<T>(args.y, at)[k] = stored;
          value[i][j] = Acc(stored);
        });
        if (partial) moments.merge(column_moments(shared, value, end - row0 < kTile ? end - row0 : kTile));
      },
      [&](const Moments<Acc>& moments, int64_t k0) {
        if (partial && threadIdx.x < kTile && k0 + threadIdx.x < s.k)
          partial[blockIdx.x * s.k + k0 + threadIdx.x] = moments;
      });
}

template <class Acc>
struct ThreadGradientSums {
  RunningGradientSums<1, Acc> of[kPerThread];
};

// args: the convolution alone, whose output is not stored. Each block leaves its chunk's sums, (chunks, K).
template <class T>
__global__ void __launch_bounds__(kThreads) sum_gradient_kernel(ConvForward args, MaskedGradient gradient,
                                                                Chunks chunks, GradientSum<Accumulator<T>>* partial) {
  using Acc = Accumulator<T>;
  using Values = Acc[kPerThread][kPerThread];
  using Running = ThreadGradientSums<Acc>;
  const ConvShape& s = args.shape;
  auto& shared = shared_memory<ForwardShared<Acc>>();
  walk_tiles<T, Running>(
      shared, args, chunks,
      [&](Running& running, Values& value, int64_t row0, int64_t end, int64_t k0) {
        for_results(s, row0, end, k0, [&](int i, int j, const Position& at, int64_t k) {
          GradientPack<T, 1> of_row;
          of_row.load(gradient, at, k);
          of_row.finish(gradient, at, k);
          running.of[j].add(of_row.g, {value[i][j]}, static_cast<const Acc*>(gradient.mean) + k,
                            static_cast<const Acc*>(gradient.invstd) + k);
        });
      },
      [&](const Running& running, int64_t k0) {
        const auto of_column = [&](auto member) {
          const Acc sum =
              sum_columns(shared, [&](int i, int j) { return i == 0 ? running.of[j].of(0).*member : Acc(0); });
          __syncthreads();
          return sum;
        };
        const GradientSum<Acc> sums{of_column(&GradientSum<Acc>::sum), of_column(&GradientSum<Acc>::sum_xhat)};
        if (threadIdx.x < kTile && k0 + threadIdx.x < s.k) partial[blockIdx.x * s.k + k0 + threadIdx.x] = sums;
      });
}

}  // namespace slowfast_fast::cuda
