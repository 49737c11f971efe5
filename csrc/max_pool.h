// max_pool over H and W, for any device that carries out primitives.h.
#pragma once
#include <torch/csrc/stable/library.h>

#include "checks.h"

namespace slowfast_fast {

// The arguments but for y.
inline MaxPool max_pool_args(const Tensor& x, int64_t kernel, int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(x.dim() == 5, "x must be (N, C, T, H, W), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(kernel >= 1 && stride >= 1 && padding >= 0 && padding <= kernel / 2,
                  "kernel and stride must be positive, padding at most half of the kernel");
  const int64_t h = x.size(3) + 2 * padding - kernel, w = x.size(4) + 2 * padding - kernel;
  STD_TORCH_CHECK(h >= 0 && w >= 0, "the kernel is larger than the padded image");
  return {x.size(0), x.size(1), x.size(2),        x.size(3),    x.size(4), h / stride + 1, w / stride + 1, kernel,
          stride,    padding,   dtype_of(x, "x"), rows(x, "x"), {}};
}

template <class Device>
Tensor max_pool(const Tensor& x, int64_t kernel, int64_t stride, int64_t padding) {
  MaxPool args = max_pool_args(x, kernel, stride, padding);
  Tensor y = empty_channels_last(x, {args.n, args.c, args.t, args.h_out, args.w_out});
  args.y = out_rows(y);
  Device(x).max_pool(args);
  return y;
}

template <class Device, class Library>
void register_max_pool(Library& m) {
  m.impl("max_pool", TORCH_BOX(&max_pool<Device>));
}

}  // namespace slowfast_fast
