// The product of two tiles on tensor cores (or, for exact float32, on FMA), fed by a pipeline of asynchronous copies.
// Forward, dgrad and wgrad differ in what they copy and in what becomes of the result.
//
// An operand's tile is kept in rows of 128 bytes, 8 chunks of 16 bytes each. Its depth (the index that the product sums
// over) spans 128 bytes of elements in either order:
//   Major::Depth   row o is outer index o, along the depth (as activations and weights lie for the forward)
//   Major::Outer   slabs of 128 bytes of outer indices; in a slab row d is depth index d (as everything lies for wgrad)
// Chunk c of row r stands at c ^ key(r), so that the 8 addresses of a matrix that ldmatrix reads, and the 16-byte
// writes of a warp, fall into different banks.
#pragma once
#include "rowwise.cuh"

namespace slowfast_fast::cuda::tile {

constexpr int kThreads = 128, kWarps = kThreads / int(kWarp);
constexpr int kRowBytes = 128, kChunkBytes = 16, kRowChunks = kRowBytes / kChunkBytes;
constexpr int kRowsPerPass = kThreads / kRowChunks;  // rows that the block's threads bring in at one chunk each
constexpr int kSteps = 4;  // a step is 32 bytes of depth: one mma of 16-bit or of TF32 operands
static_assert(kSteps * 2 == kRowChunks);

template <class T>
constexpr int kChunk = Pack<T>::kSize;
template <class T>
constexpr int kDepth = kRowBytes / int(sizeof(T));  // of a tile

enum class Major { Depth, Outer };

// The thread's lane as fragments count it: see ptx.cuh.
__device__ inline int lane() { return int(threadIdx.x % kWarp); }
__device__ inline int warp() { return int(threadIdx.x / kWarp); }
__device__ inline int lane_row() { return lane() / 4; }
__device__ inline int lane_quad() { return lane() % 4; }

template <class T_, Major major_, int outers>
struct Operand {
  using T = T_;
  static constexpr Major major = major_;
  static constexpr int kOuters = outers, kBytes = outers * kRowBytes;
  static constexpr int kPasses = outers / kRowsPerPass;  // either order has as many rows as there are outer indices
  static constexpr int kSlab = kDepth<T>;                // outer indices of a slab, and its rows
  static_assert(outers % kRowsPerPass == 0 && (major == Major::Depth || outers % kSlab == 0));

  // Bytes from the tile's begin to a chunk. Without ldmatrix, 32-bit loads take 8 outer indices of 4 depths at a time.
  __device__ static int at(int row, int chunk) {
    const int key = major == Major::Outer && sizeof(T) == 4 ? 2 * (row & 3) : row & 7;
    return row * kRowBytes + (chunk ^ key) * kChunkBytes;
  }

  // In Major::Outer of 4-byte elements.
  __device__ static uint32_t word(const unsigned char* tile, int outer, int depth) {
    const int chunk = outer % kSlab / kChunk<T>;
    const auto* words = reinterpret_cast<const uint32_t*>(tile + at(outer / kSlab * kSlab + depth, chunk));
    return words[outer % kChunk<T>];
  }

  // 16 outer indices of a step's depth, as mma's operand a; b of two neighbouring products is (r[0], r[2]) and (r[1],
  // r[3]).
  __device__ static void fragment(uint32_t (&r)[4], const unsigned char* tile, int outer, int step) {
    if constexpr (major == Major::Depth) {
      ldmatrix_x4(r, tile + at(outer + lane() % 16, 2 * step + lane() / 16));
    } else if constexpr (sizeof(T) == 2) {
      const int depth = 16 * step + lane() % 8 + lane() / 16 * 8, chunk = outer / kChunk<T> + lane() / 8 % 2;
      ldmatrix_x4_trans(r, tile + at(chunk / kRowChunks * kSlab + depth, chunk % kRowChunks));
    } else {
      for (int i = 0; i < 4; ++i) r[i] = word(tile, outer + lane_row() + i % 2 * 8, 8 * step + lane_quad() + i / 2 * 4);
    }
  }

  // Four depths of one outer index, of 4-byte elements.
  __device__ static Pack<float> depths(const unsigned char* tile, int outer, int chunk) {
    if constexpr (major == Major::Depth) {
      Pack<float> values;
      values.load(reinterpret_cast<const float*>(tile + at(outer, chunk)));
      return values;
    } else {
      Pack<float> values;
      for (int i = 0; i < 4; ++i) {
        const uint32_t bits = word(tile, outer, 4 * chunk + i);
        memcpy(&values.of[i], &bits, sizeof bits);
      }
      return values;
    }
  }
};

// A tile of the result: its size, how the warps share it, and how many stages of operands are under way. The figures
// of each are in docs/performance.md.
template <int rows, int columns, int warps_down, int stages, int blocks>
struct Shape {
  static constexpr int kRows = rows, kColumns = columns, kStages = stages;
  static constexpr int kBlocksPerSM = blocks;  // that registers must allow
  static constexpr int kWarpRows = rows / warps_down, kWarpColumns = columns / (kWarps / warps_down);
  static constexpr int kDown = kWarpRows / 16, kAcross = kWarpColumns / 8;  // products of 16 x 8 that a warp holds
  static constexpr int kStageBytes = (rows + columns) * kRowBytes;
  static_assert(kWarps % warps_down == 0 && kWarpRows % 16 == 0 && kWarpColumns % 16 == 0);

  __device__ static int warp_row() { return warp() % warps_down * kWarpRows; }
  __device__ static int warp_column() { return warp() / warps_down * kWarpColumns; }

  // Of element i of product (down, across) of this thread.
  __device__ static int row(int down, int i) { return warp_row() + down * 16 + lane_row() + i / 2 * 8; }
  __device__ static int column(int across, int i) { return warp_column() + across * 8 + lane_quad() * 2 + i % 2; }
};

// 64 x 64 results a warp: in a stage it makes 128 products of 16 x 8 x 16 of 16 KB that it reads. Smaller tiles of a
// warp would have shared memory as their limit, larger ones do not fit the registers.
using Wide = Shape<128, 128, 2, 3, 2>;
// Twice the blocks where there are too few of the above, before the depth is split.
using Tall = Shape<128, 64, 2, 3, 3>;
using Small = Shape<64, 64, 2, 4, 3>;
// With more registers to a thread: where both operands of TF32 are read word by word, from many addresses; and for Fma,
// which holds two sums of each result.
using Scattered = Shape<128, 64, 2, 3, 2>;
using Exact = Shape<64, 64, 2, 4, 2>;

template <class Shape>
using Results = float[Shape::kDown][Shape::kAcross][4];

// How a step's products are made: on tensor cores, with float32 accumulators ...
// kSumsBlocks: each tile of depth has sums of its own, which bounds the rounding error of long ones.
template <class T_, bool tf32>
struct TensorCores {
  using T = T_;
  static constexpr bool kSumsBlocks = false;

  template <class Shape, class Left, class Right>
  __device__ static void step(Results<Shape>& results, const unsigned char* left, const unsigned char* right,
                              int step) {
    uint32_t a[Shape::kDown][4], b[Shape::kAcross / 2][4];
#pragma unroll
    for (int i = 0; i < Shape::kDown; ++i) Left::fragment(a[i], left, Shape::warp_row() + 16 * i, step);
#pragma unroll
    for (int j = 0; j < Shape::kAcross / 2; ++j) Right::fragment(b[j], right, Shape::warp_column() + 16 * j, step);
    if constexpr (tf32) {
#pragma unroll
      for (auto& fragment : a) round_to_tf32(fragment);
#pragma unroll
      for (auto& fragment : b) round_to_tf32(fragment);
    }
#pragma unroll
    for (int i = 0; i < Shape::kDown; ++i)
#pragma unroll
      for (int j = 0; j < Shape::kAcross; ++j) {
        const uint32_t column[2] = {b[j / 2][j % 2], b[j / 2][j % 2 + 2]};
        if constexpr (tf32) mma_tf32(results[i][j], a[i], column);
        else mma<T>(results[i][j], a[i], column);
      }
  }
};

// ... or by FMA, in the same places. Each lane multiplies its own rows and columns.
struct Fma {
  using T = float;
  static constexpr bool kSumsBlocks = true;

  template <class Shape, class Left, class Right>
  __device__ static void step(Results<Shape>& results, const unsigned char* left, const unsigned char* right,
                              int step) {
#pragma unroll
    for (int chunk = 2 * step; chunk < 2 * step + 2; ++chunk) {
      Pack<float> b[Shape::kAcross][2];
#pragma unroll
      for (int j = 0; j < Shape::kAcross; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) b[j][i] = Right::depths(right, Shape::column(j, i), chunk);
#pragma unroll
      for (int down = 0; down < 2 * Shape::kDown; ++down) {
        const Pack<float> a = Left::depths(left, Shape::row(down / 2, down % 2 * 2), chunk);
#pragma unroll
        for (int j = 0; j < Shape::kAcross; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& result = results[down / 2][j][down % 2 * 2 + i];
#pragma unroll
            for (int d = 0; d < 4; ++d) result = fmaf(a.of[d], b[j][i].of[d], result);
          }
      }
    }
  }
};

template <class Shape>
__device__ void clear(Results<Shape>& results) {
#pragma unroll
  for (auto& row : results)
#pragma unroll
    for (auto& product : row)
#pragma unroll
      for (float& value : product) value = 0;
}

template <class Math, class Shape, class Left, class Right>
__device__ void multiply_stage(const unsigned char* stage, Results<Shape>& results) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    Math::template step<Shape, Left, Right>(results, stage, stage + Left::kBytes, step);
}

// results = the product summed over `blocks` tiles of depth, which the loader brings one after another: load(left,
// right) starts the copies of the next one. All threads take part; afterwards shared memory may still be read by
// others.
template <class Math, class Shape, class Left, class Right, class Loader>
__device__ void multiply(unsigned char* shared, Loader& loader, int blocks, Results<Shape>& results) {
  static_assert(Left::kOuters == Shape::kRows && Right::kOuters == Shape::kColumns);
  clear<Shape>(results);
  const auto load = [&](int block) {
    unsigned char* stage = shared + block % Shape::kStages * Shape::kStageBytes;
    if (block < blocks) loader.load(stage, stage + Left::kBytes);
    cp_async_commit();  // a group even if empty, so that the newest ones can be counted
  };
  for (int block = 0; block < Shape::kStages - 1; ++block) load(block);
  for (int block = 0; block < blocks; ++block) {
    cp_async_wait<Shape::kStages - 2>();
    __syncthreads();  // all copies of this stage are there, and nobody reads the one that is loaded next
    load(block + Shape::kStages - 1);
    const unsigned char* stage = shared + block % Shape::kStages * Shape::kStageBytes;
    if constexpr (Math::kSumsBlocks) {
      Results<Shape> sums;
      clear<Shape>(sums);
      multiply_stage<Math, Shape, Left, Right>(stage, sums);
#pragma unroll
      for (int i = 0; i < Shape::kDown; ++i)
#pragma unroll
        for (int j = 0; j < Shape::kAcross; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) results[i][j][e] += sums[i][j][e];
    } else {
      multiply_stage<Math, Shape, Left, Right>(stage, results);
    }
  }
}

}  // namespace slowfast_fast::cuda::tile
