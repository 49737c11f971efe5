// What fills the wide input of a slow stage in inference, instead of a concatenation: the slow pathway's last layer and
// the lateral convolution, each into its own channels of one tensor.
#pragma once
#include "lateral_concat.h"
#include "max_pool.h"

namespace slowfast_fast {

struct Lateral {
  const Tensor &fast, &weight;
  const OptionalTensor& shift;
  int64_t alpha, padding;
  bool relu, tf32;
};

// The result with the lateral part behind c_slow channels that are left to the caller, which has `frames` frames of h x
// w in them.
template <class Device>
Tensor with_lateral(const Lateral& l, const Tensor& x, int64_t c_slow, int64_t frames, int64_t h, int64_t w) {
  const ConvShape s = conv_shape(l.fast, l.weight, l.alpha, l.padding, 1);
  check_like(x, l.fast, "x");
  check_sizes(l.fast, {x.size(0), s.c, s.t_in, h, w}, "fast");
  STD_TORCH_CHECK(s.t_out == frames, "the lateral convolution gives ", s.t_out, " frames, the slow pathway has ",
                  frames);
  ConvForward args = conv_args(s, l.fast, l.weight, l.tf32, "fast");
  args.shift = vector(l.shift, l.fast, s.k, "lateral_shift");
  args.relu = l.relu;
  Tensor out = wide_buffer(c_slow, l.fast, s);
  forward_into<Device>(out, c_slow, args, l.fast);
  return out;
}

template <class Device>
Tensor temporal_conv_lateral_concat(const Tensor& x, const Tensor& weight, const OptionalTensor& shift,
                                    const OptionalTensor& residual, int64_t stride, int64_t padding, int64_t dilation,
                                    bool relu, const Tensor& fast, const Tensor& lateral_weight,
                                    const OptionalTensor& lateral_shift, int64_t alpha, int64_t lateral_padding,
                                    bool lateral_relu, bool tf32) {
  const ConvShape s = conv_shape(x, weight, stride, padding, dilation);
  const Lateral lateral{fast, lateral_weight, lateral_shift, alpha, lateral_padding, lateral_relu, tf32};
  const ConvForward args = affine_args(s, x, weight, std::nullopt, shift, residual, relu, tf32);
  Tensor out = with_lateral<Device>(lateral, x, s.k, s.t_out, x.size(3), x.size(4));
  forward_into<Device>(out, 0, args, x);
  return out;
}

template <class Device>
Tensor max_pool_lateral_concat(const Tensor& x, int64_t kernel, int64_t stride, int64_t padding, const Tensor& fast,
                               const Tensor& lateral_weight, const OptionalTensor& lateral_shift, int64_t alpha,
                               int64_t lateral_padding, bool lateral_relu, bool tf32) {
  MaxPool pool = max_pool_args(x, kernel, stride, padding);
  const Lateral lateral{fast, lateral_weight, lateral_shift, alpha, lateral_padding, lateral_relu, tf32};
  Tensor out = with_lateral<Device>(lateral, x, pool.c, pool.t, pool.h_out, pool.w_out);
  pool.y = channel_slice(out, 0);
  Device(x).max_pool(pool);
  return out;
}

template <class Device, class Library>
void register_wide(Library& m) {
  m.impl("temporal_conv_lateral_concat", TORCH_BOX(&temporal_conv_lateral_concat<Device>));
  m.impl("max_pool_lateral_concat", TORCH_BOX(&max_pool_lateral_concat<Device>));
}

}  // namespace slowfast_fast
