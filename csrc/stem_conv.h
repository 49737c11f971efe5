// stem_conv, the first convolution of a pathway, and the gradient of its weight, for any device that carries out
// primitives.h.
#pragma once
#include <torch/csrc/stable/library.h>

#include <vector>

#include "checks.h"

namespace slowfast_fast {

inline StridedClips strided_clips(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3), t.stride(4)};
}

inline StemShape stem_shape(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                            const std::vector<int64_t>& padding) {
  STD_TORCH_CHECK(x.dim() == 5, "x must be (N, C, T, H, W), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(weight.dim() == 5 && weight.size(1) == x.size(1) && weight.numel() > 0,
                  "weight must be (K, C, kt, kh, kw) with the C of the input");
  check_like(weight, x, "weight");
  STD_TORCH_CHECK(stride.size() == 3 && padding.size() == 3, "stride and padding must be (T, H, W)");
  StemShape s{x.size(0), x.size(1), weight.size(0), {}, {}, {}, {}, {}};
  for (size_t d = 0; d < 3; ++d) {
    const int64_t in = x.size(static_cast<int64_t>(d) + 2), kernel = weight.size(static_cast<int64_t>(d) + 2);
    const int64_t span = in + 2 * padding[d] - kernel;
    STD_TORCH_CHECK(stride[d] >= 1 && padding[d] >= 0, "stride must be positive, padding not negative");
    STD_TORCH_CHECK(in >= 1 && span >= 0, "the kernel is larger than the padded clip");
    s.in[d] = in;
    s.kernel[d] = kernel;
    s.stride[d] = stride[d];
    s.padding[d] = padding[d];
    s.out[d] = span / stride[d] + 1;
  }
  return s;
}

template <class Device>
Tensor stem_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& shift, std::vector<int64_t> stride,
                 std::vector<int64_t> padding, bool relu) {
  const StemShape s = stem_shape(x, weight, stride, padding);
  Tensor y = empty_channels_last(x, {s.n, s.k, s.out[0], s.out[1], s.out[2]});
  Device(x).stem_forward({s, dtype_of(x, "x"), strided_clips(x), strided_clips(weight), vector(shift, x, s.k, "shift"),
                          relu, out_rows(y)});
  return y;
}

// In the layout of weight: contiguous, or else channels_last_3d.
template <class Device>
Tensor stem_conv_wgrad(const Tensor& grad, const Tensor& x, const Tensor& weight, std::vector<int64_t> stride,
                       std::vector<int64_t> padding) {
  const StemShape s = stem_shape(x, weight, stride, padding);
  const Sizes sizes{s.k, weight.size(1), weight.size(2), weight.size(3), weight.size(4)};
  Tensor dweight = weight.is_contiguous() ? empty_contiguous(weight) : empty_channels_last(weight, sizes);
  const Rows gradient = rows_of(grad, x, {s.n, s.k, s.out[0], s.out[1], s.out[2]}, "grad");
  Device(x).stem_wgrad({s, dtype_of(x, "x"), strided_clips(x), gradient, strided_clips(dweight), dweight.data_ptr()});
  return dweight;
}

template <class Device, class Library>
void register_stem_conv(Library& m) {
  m.impl("stem_conv", TORCH_BOX(&stem_conv<Device>));
  m.impl("stem_conv_wgrad", TORCH_BOX(&stem_conv_wgrad<Device>));
}

}  // namespace slowfast_fast
