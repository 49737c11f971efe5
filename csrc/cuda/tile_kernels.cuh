// The kernels of the wide layers: rows times weight (forward and dgrad), wgrad, and the passes that prepare what they
// read.
#pragma once
#include "backward.cuh"
#include "tile_epilogue.cuh"

namespace slowfast_fast::cuda::tile {

template <class T, class Shape>
struct alignas(kRowBytes) ProductShared {
  union {
    unsigned char stages[Shape::kStageBytes * Shape::kStages];
    struct {
      Staged<Shape> sums;
      GatherScratch<T, Shape::kColumns> scratch;
    } finishing;  // after the product
  };
  SourceRow rows[Shape::kRows];
};

struct Product {
  Problem problem;
  Rows source;
  const void* weight;  // (K, kt, C)
  int kt;
  Epilogue epilogue;
  Parts parts;  // of more than one: the sums go there, and finish_kernel follows
};

// One block per tile of the result (x; tiles that share their rows follow one another, so that the rows come from L2)
// and part of the depth (y). weight_major: Depth for the forward, Outer for dgrad.
template <class Math, class Shape, Major weight_major>
__global__ void __launch_bounds__(kThreads, Shape::kBlocksPerSM) tile_product_kernel(Product args) {
  using T = typename Math::T;
  using Left = GatheredRows<T, Shape::kRows>;
  using Right = Weight<T, weight_major, Shape::kColumns>;
  auto& shared = shared_memory<ProductShared<T, Shape>>();
  const Problem& problem = args.problem;
  const int column_tiles = (problem.outers + Shape::kColumns - 1) / Shape::kColumns;
  const int tile = int(blockIdx.x) / column_tiles, first_outer = int(blockIdx.x) % column_tiles * Shape::kColumns;
  const int first_row = tile * Shape::kRows;
  const int rows = problem.rows - first_row < Shape::kRows ? problem.rows - first_row : Shape::kRows;

  const Left left(problem, args.source, first_row, shared.rows);
  __syncthreads();
  const Right right(problem, args.weight, args.kt, first_outer);
  const Terms terms = terms_of(problem, first_row, first_row + rows - 1);
  const int64_t blocks = int64_t(terms.end - terms.begin) * TermLoader<Left, Right>::blocks(problem);
  const int part = int(blockIdx.y), first = int(blocks * part / args.parts.count);
  const int last = int(blocks * (part + 1) / args.parts.count);
  TermLoader<Left, Right> loader(problem, terms, first, left, right);
  Results<Shape> results;
  multiply<Math, Shape, typename Left::Tile, typename Right::Tile>(shared.stages, loader, last - first, results);

  if (args.parts.count > 1) {
#pragma unroll
    for (int i = 0; i < Shape::kDown; ++i)
#pragma unroll
      for (int j = 0; j < Shape::kAcross; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = Shape::row(i, e), outer = first_outer + Shape::column(j, e);
          if (row < rows && outer < problem.outers)
            args.parts.at(problem, part, first_row + row)[outer] = results[i][j][e];
        }
    return;
  }
  __syncthreads();  // the stages are read no more
  auto& finishing = shared.finishing;
  finishing.sums.put(results);
  __syncthreads();
  const auto values = [&](int row, int column, float (&sums)[kChunk<T>]) {
    for (int e = 0; e < kChunk<T>; e += kChunk<float>) {
      Pack<float> pack;
      pack.load(&finishing.sums.of[row][column + e]);
      for (int i = 0; i < kChunk<float>; ++i) sums[e + i] = pack.of[i];
    }
  };
  // A dgrad gathers nothing of a gradient.
  if constexpr (weight_major == Major::Depth)
    finish<T, Shape::kColumns, kRowsAtOnce>(finishing.scratch, problem, args.epilogue, tile, first_row, rows,
                                            first_outer, values);
  else
    store<T, Shape::kColumns, kRowsAtOnce>(finishing.scratch, problem, args.epilogue, tile, first_row, rows,
                                           first_outer, values);
}

template <class Shape>
struct alignas(kRowBytes) WgradShared {
  unsigned char stages[Shape::kStageBytes * Shape::kStages];
};

// partial[chunk][k][tap * C + c], as launch_merge_wgrad takes it. One block per tile (x) and chunk of rows (y); a tile
// lies under one tap.
template <class Math, class Shape>
__global__ void __launch_bounds__(kThreads, Shape::kBlocksPerSM)
    tile_wgrad_kernel(ConvBackward args, Chunks chunks, float* partial) {
  using Loader = WgradLoader<typename Math::T, Shape::kRows, Shape::kColumns>;
  unsigned char* stages = shared_memory<WgradShared<Shape>>().stages;
  const ConvShape& s = args.shape;
  const int k_tiles = int((s.k + Shape::kRows - 1) / Shape::kRows),
            c_tiles = int((s.c + Shape::kColumns - 1) / Shape::kColumns);
  const int first_k = int(blockIdx.x) % k_tiles * Shape::kRows, of_taps = int(blockIdx.x) / k_tiles;
  const int tap = of_taps / c_tiles, first_c = of_taps % c_tiles * Shape::kColumns;
  const int64_t chunk = blockIdx.y, begin = chunks.begin(chunk), end = chunks.end(chunk);

  Loader loader(s, args.grad, args.x, first_k, tap, first_c, begin, end);
  Results<Shape> results;
  multiply<Math, Shape, typename Loader::Left, typename Loader::Right>(
      stages, loader, int((end - begin + kDepth<typename Math::T> - 1) / kDepth<typename Math::T>), results);
#pragma unroll
  for (int i = 0; i < Shape::kDown; ++i)
#pragma unroll
    for (int j = 0; j < Shape::kAcross; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int k = first_k + Shape::row(i, e), c = first_c + Shape::column(j, e);
        if (k < s.k && c < s.c) partial[((chunk * s.k + k) * s.kt + tap) * s.c + c] = results[i][j][e];
      }
}

// packed (K, kt, C) from the weight (K, C, kt), times scale(k) where there is one.
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    pack_weight(ConvShape s, const void* weight, const void* scale, T* packed) {
  const int64_t elements = s.k * s.kt * s.c;
  for (int64_t i = first_element(); i < elements; i += element_step()) {
    const int64_t c = i % s.c, j = i / s.c % s.kt, k = i / (s.c * s.kt);
    const T value = static_cast<const T*>(weight)[(k * s.c + c) * s.kt + j];
    packed[i] = scale ? T(float(value) * channel_or(scale, k, 1.f)) : value;
  }
}

}  // namespace slowfast_fast::cuda::tile
