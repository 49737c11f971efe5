// What becomes of a tile of sums: scale, shift, residual, ReLU, conversion and 16-byte stores; in training also the
// moments of what was stored, or of what would have been; or the sums of a masked gradient. The sums come from a tile
// in shared memory, or from the parts of a product whose depth was split.
#pragma once
#include "masked_gradient.cuh"
#include "tile_loaders.cuh"

namespace slowfast_fast::cuda::tile {

struct Epilogue {
  const void *centre, *scale, *shift;  // (outers) or absent: scale * (sum - centre) + shift
  Rows residual;
  const void* residual_scale;  // (outers) or absent
  bool relu;
  OutRows out;                        // absent: moments alone are wanted
  Moments<float>* moments;            // (tiles of rows, outers) or nullptr
  MaskedGradient gradient;            // in place of all of the above ...
  GradientSum<float>* gradient_sums;  // ... and its sums, likewise
};

// How a block's threads share a tile's rows: each takes one chunk of columns of every kRowLanes-th row.
template <class T, int columns>
struct Share {
  static constexpr int kColumnLanes = columns / kChunk<T>, kRowLanes = kThreads / kColumnLanes;
  static_assert(columns % kChunk<T> == 0 && kThreads % kColumnLanes == 0);

  __device__ static int column() { return int(threadIdx.x) % kColumnLanes * kChunk<T>; }
  __device__ static int row_lane() { return int(threadIdx.x) / kColumnLanes; }
};

// A thread's rows whose residual or gradient is on its way at a time: 2 KB of a warp, as in rowwise.cuh, because behind
// a shallow product an epilogue is as long as memory takes to bring what it reads. Where the sums come from memory too,
// as many registers wait for them.
constexpr int kRowsAtOnce = 4, kRowsOfPartsAtOnce = 2;

template <class T, int columns>
struct GatherScratch {
  static_assert(columns <= kThreads);
  template <class Value>
  using Lanes = Value[Share<T, columns>::kRowLanes][columns];
  union {
    Lanes<Moments<float>> moments;
    Lanes<GradientSum<float>> gradient_sums;
  };
};

// Merges the row lanes of each column into `out`, in their order. All threads take part; the scratch is theirs alone.
template <class T, int columns, class Running, class Value>
__device__ void leave_gathered(Value (&scratch)[Share<T, columns>::kRowLanes][columns], const Running& mine,
                               int present_columns, Value* out) {
  using Lanes = Share<T, columns>;
#pragma unroll
  for (int e = 0; e < kChunk<T>; ++e) scratch[Lanes::row_lane()][Lanes::column() + e] = mine.of(e);
  __syncthreads();
  const int column = int(threadIdx.x);
  if (column >= columns || column >= present_columns) return;
  Value all;
  for (const auto& lane : scratch) all.merge(lane[column]);
  out[column] = all;
}

// Calls load(i, row) for `rows_at_once` rows of this thread, then use(i, row), and so on to the last.
template <class T, int columns, int rows_at_once, class Load, class Use>
__device__ void walk(int rows, const Load& load, const Use& use) {
  constexpr int kStep = Share<T, columns>::kRowLanes;
  for (int first = Share<T, columns>::row_lane(); first < rows; first += rows_at_once * kStep) {
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i)
      if (first + i * kStep < rows) load(i, first + i * kStep);
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i)
      if (first + i * kStep < rows) use(i, first + i * kStep);
  }
}

// What follows treats rows [first_row, first_row + rows) and columns from first_outer on. values(row, column, sums)
// gives a chunk of sums; `tile` is the number of this tile of rows among those that something is gathered of.

// The results themselves.
template <class T, int columns, int rows_at_once, class Values>
__device__ void store(GatherScratch<T, columns>& scratch, const Problem& problem, const Epilogue& epilogue, int tile,
                      int first_row, int rows, int first_outer, const Values& values) {
  using Lanes = Share<T, columns>;
  const int outer = first_outer + Lanes::column();
  RunningMoments<kChunk<T>> moments;
  if (outer < problem.outers) {
    float centre[kChunk<T>], scale[kChunk<T>], shift[kChunk<T>], residual_scale[kChunk<T>];
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) {
      centre[e] = channel_or(epilogue.centre, outer + e, 0.f);
      scale[e] = channel_or(epilogue.scale, outer + e, 1.f);
      shift[e] = channel_or(epilogue.shift, outer + e, 0.f);
      residual_scale[e] = channel_or(epilogue.residual_scale, outer + e, 1.f);
    }
    const auto position = [&](int row) { return result_position(problem, first_row + row); };
    Pack<T> residual[rows_at_once];
    walk<T, columns, rows_at_once>(
        rows,
        [&](int i, int row) {
          if (epilogue.residual.data) residual[i].load(row_at<T>(epilogue.residual, position(row)) + outer);
        },
        [&](int i, int row) {
          float sums[kChunk<T>];
          values(row, Lanes::column(), sums);
          Pack<T> stored;
#pragma unroll
          for (int e = 0; e < kChunk<T>; ++e) {
            float y = fmaf(sums[e] - centre[e], scale[e], shift[e]);
            if (epilogue.residual.data) y = fmaf(float(residual[i].of[e]), residual_scale[e], y);
            stored.of[e] = T(epilogue.relu ? relu(y) : y);
          }
          if (epilogue.out.data) stored.store(row_at<T>(epilogue.out, position(row)) + outer);
          if (!epilogue.moments) return;
          if (epilogue.out.data) moments.add(stored.of);
          else moments.add(sums);
        });
  }
  if (epilogue.moments)
    leave_gathered<T, columns>(scratch.moments, moments, problem.outers - first_outer,
                               epilogue.moments + int64_t(tile) * problem.outers + first_outer);
}

// The masked gradient's sums over them.
template <class T, int columns, int rows_at_once, class Values>
__device__ void leave_gradient_sums(GatherScratch<T, columns>& scratch, const Problem& problem,
                                    const Epilogue& epilogue, int tile, int first_row, int rows, int first_outer,
                                    const Values& values) {
  using Lanes = Share<T, columns>;
  const int outer = first_outer + Lanes::column();
  RunningGradientSums<kChunk<T>> running;
  if (outer < problem.outers) {
    float mean[kChunk<T>], invstd[kChunk<T>];
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) {
      mean[e] = static_cast<const float*>(epilogue.gradient.mean)[outer + e];
      invstd[e] = static_cast<const float*>(epilogue.gradient.invstd)[outer + e];
    }
    const auto position = [&](int row) { return result_position(problem, first_row + row); };
    GradientPack<T, kChunk<T>> gradient[rows_at_once];
    walk<T, columns, rows_at_once>(
        rows, [&](int i, int row) { gradient[i].load(epilogue.gradient, position(row), outer); },
        [&](int i, int row) {
          gradient[i].finish(epilogue.gradient, position(row), outer);
          float r[kChunk<T>];
          values(row, Lanes::column(), r);
          running.add(gradient[i].g, r, mean, invstd);
        });
  }
  leave_gathered<T, columns>(scratch.gradient_sums, running, problem.outers - first_outer,
                             epilogue.gradient_sums + int64_t(tile) * problem.outers + first_outer);
}

template <class T, int columns, int rows_at_once, class... Arguments>
__device__ void finish(GatherScratch<T, columns>& scratch, const Problem& problem, const Epilogue& epilogue,
                       Arguments&&... arguments) {
  if (epilogue.gradient.grad.data)
    leave_gradient_sums<T, columns, rows_at_once>(scratch, problem, epilogue, arguments...);
  else store<T, columns, rows_at_once>(scratch, problem, epilogue, arguments...);
}

// A tile of sums in shared memory. Writing the results of a warp to it, and reading chunks, touches every bank once.
template <class Shape>
struct Staged {
  float of[Shape::kRows][Shape::kColumns + 8];

  __device__ void put(const Results<Shape>& results) {
#pragma unroll
    for (int i = 0; i < Shape::kDown; ++i)
#pragma unroll
      for (int j = 0; j < Shape::kAcross; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) of[Shape::row(i, e)][Shape::column(j, e)] = results[i][j][e];
  }
};

// Parts of a product whose depth is split, each (rows, outers), one after another.
struct Parts {
  float* sums;
  int count;

  __device__ float* at(const Problem& problem, int part, int row) const {
    return sums + (int64_t(part) * problem.rows + row) * problem.outers;
  }
};

constexpr int kFinishRows = 64, kFinishColumns = 64;

// Adds the parts in their order and finishes them. One block per tile of kFinishRows x kFinishColumns.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(Problem problem, Epilogue epilogue, Parts parts) {
  auto& scratch = shared_memory<GatherScratch<T, kFinishColumns>>();
  const int column_tiles = (problem.outers + kFinishColumns - 1) / kFinishColumns;
  const int tile = int(blockIdx.x) / column_tiles, first_outer = int(blockIdx.x) % column_tiles * kFinishColumns;
  const int first_row = tile * kFinishRows;
  const auto values = [&](int row, int column, float (&sums)[kChunk<T>]) {
    for (float& sum : sums) sum = 0;
    for (int part = 0; part < parts.count; ++part) {
      const float* from = parts.at(problem, part, first_row + row) + first_outer + column;
#pragma unroll
      for (int e = 0; e < kChunk<T>; e += kChunk<float>) {
        Pack<float> pack;
        pack.load(from + e);
#pragma unroll
        for (int i = 0; i < kChunk<float>; ++i) sums[e + i] += pack.of[i];
      }
    }
  };
  finish<T, kFinishColumns, kRowsOfPartsAtOnce>(
      scratch, problem, epilogue, tile, first_row,
      problem.rows - first_row < kFinishRows ? problem.rows - first_row : kFinishRows, first_outer, values);
}

}  // namespace slowfast_fast::cuda::tile
