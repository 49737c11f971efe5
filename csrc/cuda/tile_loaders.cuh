// Where the tiles of tile.cuh come from: rows of activations or gradients under a temporal window, and the weight.
#pragma once
#include "tile.cuh"

namespace slowfast_fast::cuda::tile {

constexpr int kNever = -(1 << 30);  // a frame outside of every clip

// The rows of a result and the rows that each of them is summed from. The forward has one result row for each row of
// its output. A dgrad of stride s is s problems: one for each residue of (t + padding) modulo s, since its input frames
// meet the same taps j = residue, residue + s, ... and no others.
//   result row (n, i, p)   is frame t = first_frame + i * frame_step of the result
//   its term number m      is row (n, window + i * window_step + m * term_step, p) of the source ...
//                          ... under tap first_tap + m * tap_step
struct Problem {
  int rows, frames, positions;  // rows = clips * frames * positions
  int first_frame, frame_step;
  int window, window_step, term_step;
  int source_frames;
  int terms, first_tap, tap_step;
  int depth;   // channels of the source
  int outers;  // channels of the result
};

// (n, i, p) of a row, with 32-bit divisions.
struct Place {
  int n, i, p;
};
__device__ inline Place place_of(const Problem& problem, int row) {
  const unsigned frame = unsigned(row) / unsigned(problem.positions);
  return {int(frame / unsigned(problem.frames)), int(frame % unsigned(problem.frames)),
          int(unsigned(row) % unsigned(problem.positions))};
}

// Where in the result the row is.
__device__ inline Position result_position(const Problem& problem, int row) {
  const Place place = place_of(problem, row);
  return {place.n, problem.first_frame + int64_t(place.i) * problem.frame_step, place.p};
}

// The terms that any of the rows has; the others would multiply zeros.
struct Terms {
  int begin, end;
};
__device__ inline Terms terms_of(const Problem& problem, int first_row, int last_row) {
  const Place first = place_of(problem, first_row), last = place_of(problem, last_row);
  Terms terms{0, problem.terms};
  if (first.n != last.n) return terms;
  const int early = problem.window + first.i * problem.window_step,
            late = problem.window + last.i * problem.window_step;
  const auto absent = [&](int m) {
    return late + m * problem.term_step < 0 || early + m * problem.term_step >= problem.source_frames;
  };
  while (terms.begin < terms.end && absent(terms.begin)) ++terms.begin;
  while (terms.begin < terms.end && absent(terms.end - 1)) --terms.end;
  return terms;
}

// The place of this thread's chunk in its row of a tile, and the first of its rows.
__device__ inline int pass_chunk() { return int(threadIdx.x) % kRowChunks; }
__device__ inline int pass_row() { return int(threadIdx.x) / kRowChunks; }

// Where a row of a tile is read from: the position's begin in frame 0 of its clip, and the frame of its first term.
struct alignas(16) SourceRow {
  const void* at;
  int frame;
};

// Source rows, in Major::Depth. Where they are is decoded once for the tile, into shared memory.
template <class T, int outers>
class GatheredRows {
 public:
  using Tile = Operand<T, Major::Depth, outers>;
  using Table = SourceRow[outers];
  static_assert(outers <= kThreads);

  // A barrier must follow before load.
  __device__ GatheredRows(const Problem& problem, const Rows& source, int first_row, Table& table)
      : problem_(problem), source_(source), table_(table) {
    const int row = first_row + int(threadIdx.x);
    if (int(threadIdx.x) >= outers) return;
    const Place place = place_of(problem, row < problem.rows ? row : 0);
    table[threadIdx.x] = {row_at<T>(source, {place.n, 0, place.p}),
                          row < problem.rows ? problem.window + place.i * problem.window_step : kNever};
  }

  __device__ void load(unsigned char* tile, int term, int depth) const {
    const int channel = depth + pass_chunk() * kChunk<T>;
#pragma unroll
    for (int i = 0; i < Tile::kPasses; ++i) {
      const int row = pass_row() + i * kRowsPerPass;
      const SourceRow from = table_[row];
      const int frame = from.frame + term * problem_.term_step;
      const bool present = unsigned(frame) < unsigned(problem_.source_frames) && channel < problem_.depth;
      cp_async16(tile + Tile::at(row, pass_chunk()),
                 present ? static_cast<const T*>(from.at) + frame * source_.stride_t + channel : source_.data, present);
    }
  }

 private:
  const Problem& problem_;
  const Rows& source_;
  const Table& table_;
};

// The weight, packed as (K, kt, C). Of the forward, in Major::Depth: outer is an output channel. Of dgrad, in
// Major::Outer: outer is an input channel.
template <class T, Major major, int outers>
class Weight {
 public:
  using Tile = Operand<T, major, outers>;

  __device__ Weight(const Problem& problem, const void* weight, int kt, int first_outer)
      : problem_(problem), weight_(static_cast<const T*>(weight)), kt_(kt), first_outer_(first_outer) {}

  __device__ void load(unsigned char* tile, int term, int depth) const {
    // Of this thread's first chunk; the next ones are kRowsPerPass rows on, and in Major::Outer then a slab.
    const int outer = first_outer_ + (major == Major::Depth ? pass_row() : pass_chunk() * kChunk<T>);
    const int d = depth + (major == Major::Depth ? pass_chunk() * kChunk<T> : pass_row());
    const int64_t step = int64_t(kt_) * (major == Major::Depth ? problem_.depth : problem_.outers);
    const int64_t tap = int64_t(problem_.first_tap + term * problem_.tap_step) *
                        (major == Major::Depth ? problem_.depth : problem_.outers);
    const T* first = weight_ + tap + (major == Major::Depth ? outer * step + d : d * step + outer);
#pragma unroll
    for (int i = 0; i < Tile::kPasses; ++i) {
      constexpr int kSlabPasses = Tile::kSlab / kRowsPerPass;
      const int rows = (major == Major::Depth ? i : i % kSlabPasses) * kRowsPerPass;
      const int slab = major == Major::Depth ? 0 : i / kSlabPasses * Tile::kSlab;
      const bool present = major == Major::Depth ? outer + rows < problem_.outers && d < problem_.depth
                                                 : outer + slab < problem_.outers && d + rows < problem_.depth;
      cp_async16(tile + Tile::at(pass_row() + i * kRowsPerPass, pass_chunk()),
                 present ? first + rows * step + slab : weight_, present);
    }
  }

 private:
  const Problem& problem_;
  const T* weight_;
  int kt_, first_outer_;
};

// Rows and weight together, term by term and along the depth of each.
template <class Left, class Right>
class TermLoader {
  static constexpr int kStep = Left::Tile::kSlab;

 public:
  // Starts at tile number `first` of those that the terms have.
  __device__ TermLoader(const Problem& problem, const Terms& terms, int first, const Left& left, const Right& right)
      : left_(left),
        right_(right),
        blocks_(blocks(problem)),
        term_(terms.begin + first / blocks_),
        block_(first % blocks_) {}

  // Tiles along the depth of a term.
  __device__ static int blocks(const Problem& problem) { return (problem.depth + kStep - 1) / kStep; }

  __device__ void load(unsigned char* left, unsigned char* right) {
    left_.load(left, term_, block_ * kStep);
    right_.load(right, term_, block_ * kStep);
    if (++block_ == blocks_) {
      block_ = 0;
      ++term_;
    }
  }

 private:
  const Left& left_;
  const Right& right_;
  int blocks_, term_, block_;
};

// Both operands of wgrad, in Major::Outer: depth is a row of the convolution's output; outer is an output channel on
// the left, a channel of the input under one tap on the right.
template <class T, int rows, int columns>
class WgradLoader {
 public:
  using Left = Operand<T, Major::Outer, rows>;
  using Right = Operand<T, Major::Outer, columns>;

  __device__ WgradLoader(const ConvShape& shape, const Rows& grad, const Rows& x, int first_k, int tap, int first_c,
                         int64_t begin, int64_t end)
      : shape_(shape), grad_(grad), x_(x), first_k_(first_k), first_c_(first_c), left_(int(end - begin) - pass_row()) {
    shift_ = int(tap * shape.dilation - shape.padding);
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      // A row past the end is never read, but is a row of the tensor all the same.
      const unsigned row = unsigned(begin) + unsigned(pass_row() + i * kRowsPerPass);
      const unsigned frame = row / unsigned(shape.p);
      place_[i] = {int(frame / unsigned(shape.t_out)), int(frame % unsigned(shape.t_out)),
                   int(row % unsigned(shape.p))};
    }
  }

  __device__ void load(unsigned char* left, unsigned char* right) {
    load_grad(left);
    load_x(right);
    left_ -= kStep;
#pragma unroll
    for (Place& place : place_) {
      place.p += kStep;
      while (place.p >= int(shape_.p)) {
        place.p -= int(shape_.p);
        if (++place.i == int(shape_.t_out)) {
          place.i = 0;
          ++place.n;
        }
      }
    }
  }

 private:
  static constexpr int kStep = kDepth<T>;
  static constexpr int kPlaces = kStep / kRowsPerPass;  // rows of a step that a thread reads from
  static_assert(kStep % kRowsPerPass == 0);

  __device__ bool present(int place) const { return left_ > place * kRowsPerPass; }

  __device__ void load_grad(unsigned char* tile) const {
    const T* base = static_cast<const T*>(grad_.data);
#pragma unroll
    for (int i = 0; i < Left::kPasses; ++i) {
      const Place& place = place_[i % kPlaces];
      const int k = first_k_ + i / kPlaces * Left::kSlab + pass_chunk() * kChunk<T>;
      const bool there = present(i % kPlaces) && k < shape_.k;
      cp_async16(tile + Left::at(pass_row() + i * kRowsPerPass, pass_chunk()),
                 there ? row_at<T>(grad_, {place.n, place.i, place.p}) + k : base, there);
    }
  }

  __device__ void load_x(unsigned char* tile) const {
    const T* base = static_cast<const T*>(x_.data);
#pragma unroll
    for (int i = 0; i < Right::kPasses; ++i) {
      const Place& place = place_[i % kPlaces];
      const int c = first_c_ + i / kPlaces * Right::kSlab + pass_chunk() * kChunk<T>;
      const int frame = place.i * int(shape_.stride) + shift_;
      const bool there = present(i % kPlaces) && c < shape_.c && unsigned(frame) < unsigned(shape_.t_in);
      cp_async16(tile + Right::at(pass_row() + i * kRowsPerPass, pass_chunk()),
                 there ? row_at<T>(x_, {place.n, frame, place.p}) + c : base, there);
    }
  }

  const ConvShape& shape_;
  const Rows &grad_, &x_;
  int first_k_, first_c_, shift_;
  int left_;  // rows from this thread's first to the end of the chunk
  Place place_[kPlaces];
};

}  // namespace slowfast_fast::cuda::tile
