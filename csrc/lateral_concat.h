// lateral_concat and its training form, for any device that carries out primitives.h. Their backward is that of
// temporal_conv on a channel slice of the gradient.
#pragma once
#include "temporal_conv.h"

namespace slowfast_fast {

// The result, uninitialised: c_slow channels of the slow pathway before those of the convolution.
inline Tensor wide_buffer(int64_t c_slow, const Tensor& fast, const ConvShape& s) {
  return empty_channels_last(fast, {s.n, c_slow + s.k, s.t_out, fast.size(3), fast.size(4)});
}

// The result with `slow` in its first channels; the convolution goes into the rest.
template <class Device>
Tensor concat_buffer(const Tensor& slow, const Tensor& fast, const ConvShape& s) {
  STD_TORCH_CHECK(slow.dim() == 5, "slow must be (N, C, T, H, W), got ", slow.dim(), " dimensions");
  check_like(slow, fast, "slow");
  const int64_t c_slow = slow.size(1);
  check_sizes(slow, {s.n, c_slow, s.t_out, fast.size(3), fast.size(4)}, "slow");
  Tensor out = wide_buffer(c_slow, fast, s);
  Device(fast).copy({s.n, c_slow, s.t_out, s.p, dtype_of(fast, "fast"), rows(slow, "slow"), out_rows(out)});
  return out;
}

template <class Device>
Tensor lateral_concat(const Tensor& slow, const Tensor& fast, const Tensor& weight, const OptionalTensor& scale,
                      const OptionalTensor& shift, int64_t alpha, int64_t padding, bool relu, bool tf32) {
  const ConvShape s = conv_shape(fast, weight, alpha, padding, 1);
  const ConvForward args = affine_args(s, fast, weight, scale, shift, std::nullopt, relu, tf32, "fast");
  Tensor out = concat_buffer<Device>(slow, fast, s);
  forward_into<Device>(out, slow.size(1), args, fast);
  return out;
}

template <class Device>
Tensor lateral_concat_bn_frozen(const Tensor& slow, const Tensor& fast, const Tensor& weight,
                                const OptionalTensor& gamma, const OptionalTensor& beta, const Tensor& running_mean,
                                const Tensor& running_var, int64_t alpha, int64_t padding, double eps, bool relu,
                                bool tf32) {
  const ConvShape s = conv_shape(fast, weight, alpha, padding, 1);
  ConvForward args = affine_args(s, fast, weight, std::nullopt, std::nullopt, std::nullopt, relu, tf32, "fast");
  const FoldedBatchNorm<Device> folded(args, {gamma, beta, running_mean, running_var, eps}, fast);
  Tensor out = concat_buffer<Device>(slow, fast, s);
  forward_into<Device>(out, slow.size(1), args, fast);
  return out;
}

template <class Device>
Normalised lateral_concat_bn(const Tensor& slow, const Tensor& fast, const Tensor& weight, const OptionalTensor& gamma,
                             const OptionalTensor& beta, int64_t alpha, int64_t padding, double eps, bool relu,
                             bool tf32) {
  const ConvShape s = conv_shape(fast, weight, alpha, padding, 1);
  Tensor out = concat_buffer<Device>(slow, fast, s);
  auto [raw, mean, invstd, unbiased_var] =
      conv_normalised<Device>(fast, weight, s, gamma, beta, {}, eps, relu, tf32, channel_slice(out, slow.size(1)));
  return {out, raw, mean, invstd, unbiased_var};
}

template <class Device, class Library>
void register_lateral_concat(Library& m) {
  m.impl("lateral_concat", TORCH_BOX(&lateral_concat<Device>));
  m.impl("lateral_concat_bn_frozen", TORCH_BOX(&lateral_concat_bn_frozen<Device>));
  m.impl("lateral_concat_bn", TORCH_BOX(&lateral_concat_bn<Device>));
}

}  // namespace slowfast_fast
