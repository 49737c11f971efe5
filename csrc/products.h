// PyTorch's own matrix product, for wide pointwise convolutions.
#pragma once
#include "checks.h"

namespace slowfast_fast {

// Whether the rows of all clips lie one stride apart, so that they are one matrix.
inline bool is_matrix(const Tensor& clips) {
  const Rows r = rows(clips, "x");
  const int64_t frame = clips.size(3) * clips.size(4) * r.stride_p;
  return (clips.size(2) == 1 || r.stride_t == frame) && (clips.size(0) == 1 || r.stride_n == clips.size(2) * frame);
}

// Clips (N, C, T, H, W) as (N * T * H * W, C), in the same memory.
inline Tensor as_matrix(const Tensor& clips) {
  using torch::stable::transpose;
  const std::array<int64_t, 2> sizes{clips.size(0) * clips.size(2) * clips.size(3) * clips.size(4), clips.size(1)};
  return torch::stable::view(transpose(transpose(transpose(clips, 1, 2), 2, 3), 3, 4), {sizes.data(), sizes.size()});
}

// A contiguous weight (K, C, 1, 1, 1) as (K, C), in the same memory.
inline Tensor pointwise_matrix(const Tensor& weight) {
  const std::array<int64_t, 2> sizes{weight.size(0), weight.size(1)};
  return torch::stable::view(weight, {sizes.data(), sizes.size()});
}

// out = a * b. Autocast leaves the form with `out` alone.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // a handle that is left would never be freed
}

inline Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t columns) {
  return empty<2>({rows, columns}, like.scalar_type(), like.device());
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

}  // namespace slowfast_fast
