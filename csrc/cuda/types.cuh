// Number types, rows and the cutting of work into chunks, shared by all kernels.
#pragma once
#include <math.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "../primitives.h"
#include "platform.cuh"

namespace slowfast_fast::cuda {

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the storage type of dtype.
template <class F>
void with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::Float32: return f(Type<float>{});
    case Dtype::Float64: return f(Type<double>{});
    case Dtype::Float16: return f(Type<torch::headeronly::Half>{});
    case Dtype::BFloat16: return f(Type<torch::headeronly::BFloat16>{});
  }
}

// Where a row stands in its tensor: clip n, frame t, position p = h * W + w.
struct Position {
  int64_t n, t, p;
};

// Of row number `row` when a clip has `frames` frames of `positions` rows each.
__device__ inline Position position_of(int64_t row, int64_t frames, int64_t positions) {
  const int64_t frame = row / positions;
  return {frame / frames, frame % frames, row % positions};
}

template <class T>
__device__ const T* row_at(const Rows& rows, const Position& at) {
  return static_cast<const T*>(rows.data) + at.n * rows.stride_n + at.t * rows.stride_t + at.p * rows.stride_p;
}

template <class T>
__device__ T* row_at(const OutRows& rows, const Position& at) {
  return static_cast<T*>(rows.data) + at.n * rows.stride_n + at.t * rows.stride_t + at.p * rows.stride_p;
}

// Element k of a per-channel vector, or what its absence stands for.
template <class Acc>
__device__ Acc channel_or(const void* vector, int64_t k, Acc absent) {
  return vector ? static_cast<const Acc*>(vector)[k] : absent;
}

// NaN stays NaN, as in torch.relu.
template <class Acc>
__device__ Acc relu(Acc value) {
  return value < Acc(0) ? Acc(0) : value;
}

// [0, size) in `count` runs of `length`, the last of which may be shorter. It follows from the sizes alone, never from
// the device, so that a sum taken chunk by chunk is the same everywhere and every time.
struct Chunks {
  int64_t size, length, count;

  __device__ int64_t begin(int64_t chunk) const { return chunk * length; }
  __device__ int64_t end(int64_t chunk) const { return begin(chunk) + length < size ? begin(chunk) + length : size; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// At most `most` chunks, each a multiple of `unit` long.
inline Chunks cut(int64_t size, int64_t unit, int64_t most) {
  const int64_t length = std::max<int64_t>(1, ceil_div(ceil_div(size, unit), most)) * unit;
  return {size, length, ceil_div(size, length)};
}

// Partial results that a reduction over rows leaves at most: enough blocks to fill a large GPU a few times over.
constexpr int64_t kMostPartials = 1024;
constexpr int64_t kMostGridYZ = 65535;  // CUDA's limit for gridDim.y and gridDim.z

// The shape of a kernel launch.
struct Launch {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes;
};

inline int64_t rows_in(const ConvShape& s) { return s.n * s.t_in * s.p; }
inline int64_t rows_out(const ConvShape& s) { return s.n * s.t_out * s.p; }

}  // namespace slowfast_fast::cuda
