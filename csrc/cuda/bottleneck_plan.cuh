// How a bottleneck block is cut into items: a block of threads computes `frames` frames of a band of rows and columns
// of the output, and keeps a for them, with the places around the band that b sees, in shared memory.
#pragma once
#include "types.cuh"

namespace slowfast_fast::cuda::bottleneck {

constexpr int kThreads = 128;

// Sizes of an item's output, at most; those at an end of the tensor are smaller.
struct Band {
  int frames, rows, columns;
};

struct Plan {
  Bottleneck block;
  Band band;
  int h_out, w_out;
  int frame_bands, row_bands, column_bands;
  int a_rows, a_columns;  // that shared memory holds of a for a frame
  int64_t items;
};

inline int64_t reach(int64_t places, const Bottleneck& s) { return (places - 1) * s.stride + 1 + 2 * s.dilation; }

inline Plan plan_with(const Bottleneck& s, const Band& band) {
  Plan plan{};
  plan.block = s;
  plan.band = band;
  plan.h_out = int(s.h_out()), plan.w_out = int(s.w_out());
  plan.frame_bands = int(ceil_div(s.t, band.frames));
  plan.row_bands = int(ceil_div(plan.h_out, band.rows));
  plan.column_bands = int(ceil_div(plan.w_out, band.columns));
  plan.a_rows = int(reach(band.rows, s)), plan.a_columns = int(reach(band.columns, s));
  plan.items = s.n * plan.frame_bands * plan.row_bands * plan.column_bands;
  return plan;
}

constexpr int64_t kWantedItems = 264;  // two for each SM of the largest GPUs
constexpr int kMostFrames = 8;         // from there on, frames that items share are a fifth of the reads or less

// The plan that reads the fewest bytes among those whose shared memory, bytes(plan), fits; where there are fewer items
// than a device has room for, as many as wanted count, for the rest of it idles.
template <class Bytes>
Plan choose_plan(const Bottleneck& s, size_t element, size_t most_bytes, int64_t wanted_items, const Bytes& bytes) {
  const int64_t weights = s.j * s.c * s.kt + 9 * s.j * s.j + s.j * s.k + (s.weight_shortcut ? s.c * s.k : 0);
  Plan best = plan_with(s, {1, 1, 1});
  double least = -1;
  for (int frames = 1; frames <= std::min<int64_t>(kMostFrames, s.t); ++frames)
    for (int rows = int(s.h_out());; rows = int(ceil_div(rows, 2))) {
      for (int columns = int(s.w_out());; columns = int(ceil_div(columns, 2))) {
        const Plan plan = plan_with(s, {frames, rows, columns});
        const double seen = double(std::min<int64_t>(plan.a_rows, s.h)) * std::min<int64_t>(plan.a_columns, s.w);
        const double reads = (double(frames + s.kt - 1) * seen * double(s.c) + double(weights)) * double(element);
        const double cost = reads * double(std::max(plan.items, wanted_items));
        if (bytes(plan) <= most_bytes && (least < 0 || cost < least)) best = plan, least = cost;
        if (columns == 1) break;
      }
      if (rows == 1) break;
    }
  return best;
}

// Places along H or W of which an item needs a: [begin, end) lie in the image, and place 0 of shared memory is `first`.
struct Reach {
  int first, begin, end;

  __device__ Reach(int out, int count, int size, const Bottleneck& s)
      : first(out * int(s.stride) - int(s.dilation)), begin(first > 0 ? first : 0) {
    const int last = first + (count - 1) * int(s.stride) + 2 * int(s.dilation);
    end = last < size ? last + 1 : size;
  }
  __device__ int count() const { return end - begin; }
  __device__ bool holds(int place) const { return first + place >= begin && first + place < end; }
};

struct Item {
  int64_t n;
  int t, row, column;         // of the first output
  int frames, rows, columns;  // outputs

  __device__ Item(const Plan& plan, int index) {
    column = index % plan.column_bands * plan.band.columns, index /= plan.column_bands;
    row = index % plan.row_bands * plan.band.rows, index /= plan.row_bands;
    t = index % plan.frame_bands * plan.band.frames, n = index / plan.frame_bands;
    frames = less(plan.band.frames, int(plan.block.t) - t);
    rows = less(plan.band.rows, plan.h_out - row);
    columns = less(plan.band.columns, plan.w_out - column);
  }
  __device__ static int less(int a, int b) { return a < b ? a : b; }

  // Of an output, and of the row of x where the shortcut reads for it.
  __device__ Position output(const Plan& plan, int frame, int r, int c) const {
    return {n, t + frame, int64_t(row + r) * plan.w_out + column + c};
  }
  __device__ Position input(const Plan& plan, int frame, int r, int c) const {
    const int64_t stride = plan.block.stride;
    return {n, t + frame, (row + r) * stride * plan.block.w + (column + c) * stride};
  }
};

// A place among frames of rows x columns places.
struct Place {
  int frame, row, column;

  __device__ Place(int index, int rows, int columns)
      : frame(index / (rows * columns)), row(index / columns % rows), column(index % columns) {}
};

}  // namespace slowfast_fast::cuda::bottleneck
