// One tile of a matrix product, for any pair of operands that can be read element by element: the arithmetic of the
// convolution, its dgrad and its wgrad alike.
//
// An operand is a matrix of outer x depth elements (the product sums over depth). Both indices are decoded once and
// used often, so reading is split in three: outer(i) and depth(d) give cursors, load(outer, depth) the element.
// kDepthAdjacent says along which index neighbouring elements are neighbours in memory, and hence how a warp should
// read.
#pragma once
#include "types.cuh"

namespace slowfast_fast::cuda {

constexpr int kTile = 64;      // outer indices of either operand in a tile of the product
constexpr int kDepth = 16;     // depth indices staged in shared memory at a time
constexpr int kThreads = 256;  // 16 x 16 threads ...
constexpr int kThreadRows = 16;
constexpr int kPerThread = kTile / kThreadRows;  // ... of 4 x 4 results each, 16 apart
// A warp that writes 16 depth indices of two outer ones touches 32 different banks (floats).
constexpr int kPitch = kTile + 2;
static_assert(kThreads == kThreadRows * kThreadRows && kThreads % kTile == 0 && kThreads % kDepth == 0);

template <class Acc>
struct Tiles {
  Acc left[kDepth][kPitch], right[kDepth][kPitch];
};

struct Range {
  int64_t begin, end;
};

// An operand with the roles of its two indices exchanged.
template <class Operand>
struct Transposed {
  static constexpr bool kDepthAdjacent = !Operand::kDepthAdjacent;
  Operand operand;

  __device__ auto outer(int64_t i) const { return operand.depth(i); }
  __device__ auto depth(int64_t d) const { return operand.outer(d); }
  template <class Outer, class Depth>
  __device__ auto load(const Outer& outer, const Depth& depth) const {
    return operand.load(depth, outer);
  }
};

// A thread's share in bringing one operand's tile to shared memory.
template <class Operand>
class Stager {
  static constexpr int kAdjacent = Operand::kDepthAdjacent ? kDepth : kTile;  // threads along the adjacent index
  static constexpr int kApart = kThreads / kAdjacent;
  static constexpr int kOuters = Operand::kDepthAdjacent ? kTile / kApart : 1;
  static constexpr int kDepths = Operand::kDepthAdjacent ? 1 : kDepth / kApart;
  using Outer = decltype(std::declval<Operand>().outer(0));

 public:
  __device__ Stager(const Operand& operand, const Range& outer)
      : operand_(operand),
        first_outer_(Operand::kDepthAdjacent ? threadIdx.x / kAdjacent : threadIdx.x % kAdjacent),
        first_depth_(Operand::kDepthAdjacent ? threadIdx.x % kAdjacent : threadIdx.x / kAdjacent) {
    for (int i = 0; i < kOuters; ++i) {
      const int64_t index = outer.begin + first_outer_ + i * kApart;
      present_[i] = index < outer.end;
      outer_[i] = operand.outer(index);
    }
  }

  // Elements outside of either range are 0.
  template <class Acc>
  __device__ void stage(int64_t begin, int64_t end, Acc (&tile)[kDepth][kPitch]) const {
    for (int j = 0; j < kDepths; ++j) {
      const int d = first_depth_ + j * kApart;
      const auto depth = operand_.depth(begin + d);
      for (int i = 0; i < kOuters; ++i)
        tile[d][first_outer_ + i * kApart] =
            present_[i] && begin + d < end ? Acc(operand_.load(outer_[i], depth)) : Acc(0);
    }
  }

 private:
  const Operand& operand_;
  int first_outer_, first_depth_;
  Outer outer_[kOuters];
  bool present_[kOuters];
};

// The outer indices of a tile that a thread holds results of.
__device__ inline int64_t tile_row(int i) { return threadIdx.x / kThreadRows + i * kThreadRows; }
__device__ inline int64_t tile_column(int j) { return threadIdx.x % kThreadRows + j * kThreadRows; }

// result[i][j] = sum over depth of left(rows.begin + tile_row(i), d) * right(columns.begin + tile_column(j), d); 0
// outside of the ranges. Every thread of the block takes part. Sums are taken over kDepth products first, which bounds
// the rounding error of long ones.
template <class Acc, class Left, class Right>
__device__ void multiply_tile(Tiles<Acc>& tiles, const Left& left, const Right& right, const Range& rows,
                              const Range& columns, const Range& depth, Acc (&result)[kPerThread][kPerThread]) {
  const Stager<Left> left_stager(left, rows);
  const Stager<Right> right_stager(right, columns);
  for (auto& row : result)
    for (Acc& value : row) value = Acc(0);
  for (int64_t d0 = depth.begin; d0 < depth.end; d0 += kDepth) {
    left_stager.stage(d0, depth.end, tiles.left);
    right_stager.stage(d0, depth.end, tiles.right);
    __syncthreads();
    Acc partial[kPerThread][kPerThread] = {};
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
#pragma unroll
        for (int j = 0; j < kPerThread; ++j)
          partial[i][j] = fma(tiles.left[d][tile_row(i)], tiles.right[d][tile_column(j)], partial[i][j]);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) result[i][j] += partial[i][j];
    __syncthreads();
  }
}

}  // namespace slowfast_fast::cuda
