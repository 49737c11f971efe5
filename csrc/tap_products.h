// The gradient of a temporal weight as one matrix product for each tap, for wide layers that keep the number of frames:
// the rows of all frames are one matrix, and a tap joins it with itself, shifted by frames.
#pragma once
#include <cstdlib>

#include "products.h"

namespace slowfast_fast {

// Into dweight (K, C, kt, 1, 1), whose channels are adjacent, from dense rows grad (N, K, T, H, W) and x, one matrix of
// the same T.
template <class Device>
void wgrad_by_taps(Device& device, const Tensor& grad, const Tensor& x, const ConvShape& s, const Tensor& dweight) {
  using torch::stable::narrow;
  const std::array<int64_t, 2> sizes{s.k, s.c};
  const int64_t all = s.n * s.t_in * s.p, size = static_cast<int64_t>(grad.element_size());
  // Where a tap finds no frame in its clip, the shifted matrix has a frame of the next one: the gradient there is 0.
  Tensor met = empty_channels_last(grad, {s.n, s.k, s.t_in, grad.size(3), grad.size(4)});
  for (int64_t tap = 0; tap < s.kt; ++tap) {
    Tensor to = torch::stable::view(torch::stable::select(dweight, 2, tap), {sizes.data(), sizes.size()});
    const int64_t offset = tap * s.dilation - s.padding, apart = std::abs(offset), frames = s.t_in - apart;
    if (frames <= 0 || all == 0) {
      torch::stable::zero_(to);
      continue;
    }
    const int64_t from_grad = offset < 0 ? apart : 0, from_x = offset > 0 ? apart : 0, rows_met = all - apart * s.p;
    if (offset != 0) {
      torch::stable::zero_(met);
      Rows from = rows(grad, "grad");
      OutRows copied = out_rows(met);
      from.data = static_cast<const char*>(from.data) + from_grad * from.stride_t * size;
      copied.data = static_cast<char*>(copied.data) + from_grad * copied.stride_t * size;
      device.copy({s.n, s.k, frames, s.p, dtype_of(grad, "grad"), from, copied});
    }
    Tensor left = as_matrix(offset ? met : grad), right = as_matrix(x);
    multiply(transposed(narrow(left, 0, from_grad * s.p, rows_met)), narrow(right, 0, from_x * s.p, rows_met), to);
  }
}

}  // namespace slowfast_fast
