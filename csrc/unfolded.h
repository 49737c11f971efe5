// The gradient of a spatial weight as one matrix product, for small images of many channels: with every row of the
// gradient stand side by side the nine rows of the input that it has seen.
#pragma once
#include <algorithm>

#include "images.h"
#include "products.h"

namespace slowfast_fast {

// Along one dimension: the results [begin, end) whose tap at `offset` lies within `length` positions.
struct TapRange {
  int64_t begin, end;
  TapRange(int64_t offset, int64_t length, int64_t results, int64_t stride)
      : begin(offset < 0 ? (-offset + stride - 1) / stride : 0),
        end(offset < length ? std::min(results, (length - 1 - offset) / stride + 1) : 0) {}
};

// (rows of the result, 9 * J) from dense rows x (N, J, T, H, W); 0 where a tap lies outside.
template <class Device>
Tensor unfold(Device& device, const Tensor& x, int64_t h_out, int64_t w_out, const SpatialConv& conv) {
  const int64_t frames = x.size(0) * x.size(2), j = x.size(1), h = x.size(3), w = x.size(4), s = conv.stride;
  const int64_t size = static_cast<int64_t>(x.element_size());
  Tensor unfolded = empty_matrix(x, frames * h_out * w_out, 9 * j);
  torch::stable::zero_(unfolded);
  for (int64_t tap = 0; tap < 9; ++tap) {
    const int64_t dh = (tap / 3 - 1) * conv.dilation, dw = (tap % 3 - 1) * conv.dilation;
    const TapRange in_h(dh, h, h_out, s), in_w(dw, w, w_out, s);
    if (in_h.begin >= in_h.end || in_w.begin >= in_w.end) continue;
    const int64_t from = ((in_h.begin * s + dh) * w + in_w.begin * s + dw) * j;
    const int64_t to = ((in_h.begin * w_out + in_w.begin) * 9 + tap) * j;
    device.copy({frames,
                 j,
                 in_h.end - in_h.begin,
                 in_w.end - in_w.begin,
                 dtype_of(x, "x"),
                 {static_cast<const char*>(x.data_ptr()) + from * size, h * w * j, s * w * j, s * j},
                 {static_cast<char*>(unfolded.data_ptr()) + to * size, h_out * w_out * 9 * j, w_out * 9 * j, 9 * j}});
  }
  return unfolded;
}

// The gradient of weight (J, J, 1, 3, 3), in its layout, from that of the result, dense rows.
template <class Device>
Tensor unfolded_wgrad(Device& device, const Tensor& grad, const Tensor& x, const Tensor& weight,
                      const SpatialConv& conv) {
  using torch::stable::transpose;
  const int64_t j = x.size(1);
  const std::array<int64_t, 4> taps{j, 3, 3, j};
  const Tensor product = empty_matrix(x, j, 9 * j);
  multiply(transposed(as_matrix(grad)), unfold(device, x, grad.size(3), grad.size(4), conv), product);
  const Tensor rows = torch::stable::view(product, {taps.data(), taps.size()});
  return as_weight(transpose(transpose(rows, 2, 3), 1, 2), weight);
}

}  // namespace slowfast_fast
