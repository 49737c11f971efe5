// The gradients: sums over rows (shift, gamma, beta) with the residual's gradient, dgrad, and wgrad in two stages.
#pragma once
#include "moments.cuh"
#include "operands.cuh"
#include "product.cuh"

namespace slowfast_fast::cuda {

// One block per chunk of output rows (y) and group of channels (x). Writes the residual's gradient, the gradient past
// the ReLU, if it is wanted, and leaves the chunk's sums of it and of it times xhat, (chunks, K) each, where there is
// room for them.
template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    gradient_sums(ConvBackward args, Chunks chunks, Accumulator<T>* partial, Accumulator<T>* partial_xhat) {
  using Acc = Accumulator<T>;
  const ConvShape& s = args.shape;
  const OutputGradient<T> gradient(args, nullptr, nullptr);
  const int64_t k = lane_channel(), chunk = blockIdx.y;
  Acc sum = 0, sum_xhat = 0;
  if (k < s.k) {
#pragma unroll 1
    for (int64_t row = chunks.begin(chunk) + row_lane(); row < chunks.end(chunk); row += kRowLanes) {
      const Position at = position_of(row, s.t_out, s.p);
      const Acc g = gradient.masked(at, k);
      if (args.dresidual.data) row_at<T>(args.dresidual, at)[k] = T(g);
      sum += g;
      if (partial_xhat) sum_xhat = fma(g, xhat<T>(args.bn, at, k), sum_xhat);
    }
  }
  const auto leave = [&](Acc value, Acc* where) {
    if (!where) return;
    value = sum_row_lanes(value);
    if (row_lane() == 0 && k < s.k) where[chunk * s.k + k] = value;
  };
  leave(sum, partial);
  leave(sum_xhat, partial_xhat);
}

// One block per chunk of input rows and (grid-stride) tile of input channels. sum and sum_xhat: (K), BatchNorm only.
template <class T>
__global__ void __launch_bounds__(kThreads)
    dgrad_kernel(ConvBackward args, Chunks chunks, const Accumulator<T>* sum, const Accumulator<T>* sum_xhat) {
  using Acc = Accumulator<T>;
  const ConvShape& s = args.shape;
  auto& tiles = shared_memory<Tiles<Acc>>();
  const OutputGradient<T> gradient(args, sum, sum_xhat);
  const DgradGradient<T> grad{s, gradient};
  const DgradWeight<T> weight{s, static_cast<const T*>(args.weight)};
  const int64_t end = chunks.end(blockIdx.x);

  for (int64_t c0 = int64_t(blockIdx.y) * kTile; c0 < s.c; c0 += int64_t(gridDim.y) * kTile) {
    for (int64_t row0 = chunks.begin(blockIdx.x); row0 < end; row0 += kTile) {
      Acc value[kPerThread][kPerThread];
      multiply_tile(tiles, grad, weight, {row0, end}, {c0, s.c}, {0, s.kt * s.k}, value);
      for (int i = 0; i < kPerThread; ++i) {
        const int64_t row = row0 + tile_row(i);
        if (row >= end) continue;
        const Position at = position_of(row, s.t_in, s.p);
        T* dx = row_at<T>(args.dx, at);
        const T* residual = args.dx_residual.data ? row_at<T>(args.dx_residual, at) : nullptr;
        for (int j = 0; j < kPerThread; ++j) {
          const int64_t c = c0 + tile_column(j);
          if (c < s.c) dx[c] = T(residual ? value[i][j] + Acc(residual[c]) : value[i][j]);
        }
      }
    }
  }
}

// partial[chunk][k][tap * C + channel]: the weight's gradient over a chunk of output rows, but for factor(k). One block
// per chunk and (grid-stride) tile.
template <class T>
__global__ void __launch_bounds__(kThreads) wgrad_kernel(ConvBackward args, Chunks chunks, const Accumulator<T>* sum,
                                                         const Accumulator<T>* sum_xhat, Accumulator<T>* partial) {
  using Acc = Accumulator<T>;
  const ConvShape& s = args.shape;
  auto& tiles = shared_memory<Tiles<Acc>>();
  const OutputGradient<T> gradient(args, sum, sum_xhat);
  const WgradGradient<T> grad{s, gradient};
  const Transposed<Window<T>> x{{s, args.x}};
  const int64_t taps = s.kt * s.c, chunk = blockIdx.x;

  for (int64_t k0 = int64_t(blockIdx.y) * kTile; k0 < s.k; k0 += int64_t(gridDim.y) * kTile) {
    for (int64_t tap0 = int64_t(blockIdx.z) * kTile; tap0 < taps; tap0 += int64_t(gridDim.z) * kTile) {
      Acc value[kPerThread][kPerThread];
      multiply_tile(tiles, grad, x, {k0, s.k}, {tap0, taps}, {chunks.begin(chunk), chunks.end(chunk)}, value);
      for (int i = 0; i < kPerThread; ++i) {
        const int64_t k = k0 + tile_row(i);
        for (int j = 0; j < kPerThread; ++j) {
          const int64_t tap = tap0 + tile_column(j);
          if (k < s.k && tap < taps) partial[(chunk * s.k + k) * taps + tap] = value[i][j];
        }
      }
    }
  }
}

// One block per output channel: brings the sum over all rows, (K, kt, C), to the weight's order and applies factor(k).
// The affine form's dscale is the product of the weight with the gradient before that factor: sum over rows of g *
// conv(x).
template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    finish_wgrad(ConvBackward args, const Accumulator<T>* sum, Accumulator<T>* dscale) {
  using Acc = Accumulator<T>;
  const ConvShape& s = args.shape;
  const OutputGradient<T> gradient(args, nullptr, nullptr);
  const int64_t k = blockIdx.x, taps = s.kt * s.c;
  auto* dweight = static_cast<T*>(args.dweight);
  Acc product = 0;
  for (int64_t tap = threadIdx.x; tap < taps; tap += blockDim.x) {
    const Acc value = sum[k * taps + tap];
    const int64_t j = tap / s.c, c = tap - j * s.c;
    const int64_t at = (k * s.c + c) * s.kt + j;
    if (dweight) dweight[at] = T(gradient.factor(k) * value);
    product = fma(Acc(static_cast<const T*>(args.weight)[at]), value, product);
  }
  if (!dscale) return;
  product = fold_threads(kReduceThreads, 1, product, Add());
  if (threadIdx.x == 0) dscale[k] = product;
}

// From the chunks' partial results to dweight and, if it is wanted, dscale.
template <class T, class Queue>
void launch_merge_wgrad(Queue& queue, const ConvBackward& args, Accumulator<T>* partial, int64_t chunks,
                        Accumulator<T>* dscale) {
  using Acc = Accumulator<T>;
  const int64_t values = args.shape.k * args.shape.kt * args.shape.c;
  if (chunks != 1) {
    const MergePlan plan = merge_plan(chunks, values);
    const ChunkSum<Acc> sums{partial, queue.template workspace<Acc>(values)};
    queue.launch(sum_chunks<Acc>, merge_launch(plan, 1, sizeof(BlockValues<Acc>)), plan, sums, sums);
    partial = sums.to;
  }
  queue.launch(finish_wgrad<T>, {dim3(unsigned(args.shape.k)), kReduceThreads, sizeof(BlockValues<Acc>)}, args, partial,
               dscale);
}

}  // namespace slowfast_fast::cuda
