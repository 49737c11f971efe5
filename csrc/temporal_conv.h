// temporal_conv, its training form with BatchNorm, and their backwards, for any device that carries out primitives.h.
#pragma once
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"

namespace slowfast_fast {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Normalised = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Of x, with the epilogue of the affine form.
inline ConvForward affine_args(const ConvShape& s, const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                               const OptionalTensor& shift, const OptionalTensor& residual, bool relu, bool tf32,
                               const char* name = "x") {
  ConvForward args = conv_args(s, x, weight, tf32, name);
  args.scale = vector(scale, x, s.k, "scale");
  args.shift = vector(shift, x, s.k, "shift");
  args.residual = optional_rows(residual, x, output_sizes(s, x), "residual");
  args.relu = relu;
  return args;
}

// The result of a convolution of x, into the channels of `out` from `first` on.
template <class Device>
void forward_into(const Tensor& out, int64_t first, ConvForward args, const Tensor& x) {
  args.y = channel_slice(out, first);
  Device(x).forward(args);
}

// The result in memory of its own.
template <class Device>
Tensor run_forward(const ConvForward& args, const Tensor& x) {
  Tensor y = empty_channels_last(x, output_sizes(args.shape, x));
  forward_into<Device>(y, 0, args, x);
  return y;
}

template <class Device>
Tensor temporal_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& shift,
                     const OptionalTensor& residual, int64_t stride, int64_t padding, int64_t dilation, bool relu,
                     bool tf32) {
  const ConvShape s = conv_shape(x, weight, stride, padding, dilation);
  return run_forward<Device>(affine_args(s, x, weight, scale, shift, residual, relu, tf32), x);
}

// The weight as the device's kernels read it, bytes for temporal_conv_packed to be given for every x of this dtype and
// device whose result has one frame, or for every one whose result has several. Empty where the kernels read the weight
// as it is.
template <class Device>
Tensor temporal_conv_pack(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, int64_t dilation,
                          bool tf32) {
  ConvForward args{};
  args.shape = conv_shape(x, weight, stride, padding, dilation);
  args.dtype = dtype_of(x, "x");
  args.tf32 = tf32;
  args.weight = weight.data_ptr();
  const int64_t bytes = Device::packed_bytes(args);
  Tensor packed = empty<1>({bytes}, ScalarType::Byte, x.device());
  if (bytes) Device(x).pack(args, packed.data_ptr());
  return packed;
}

template <class Device>
Tensor temporal_conv_packed(const Tensor& x, const Tensor& weight, const Tensor& packed, const OptionalTensor& scale,
                            const OptionalTensor& shift, const OptionalTensor& residual, int64_t stride,
                            int64_t padding, int64_t dilation, bool relu, bool tf32) {
  const ConvShape s = conv_shape(x, weight, stride, padding, dilation);
  ConvForward args = affine_args(s, x, weight, scale, shift, residual, relu, tf32);
  const int64_t bytes = Device::packed_bytes(args);
  STD_TORCH_CHECK(packed.numel() == bytes && packed.scalar_type() == ScalarType::Byte && packed.device() == x.device(),
                  "packed must be ", bytes, " bytes from temporal_conv_pack for this x and weight, got ",
                  packed.numel());
  if (bytes) args.packed = packed.data_ptr();
  return run_forward<Device>(args, x);
}

// Statistics of BatchNorm that a call only applies, and what it needs to fold them into a scale and a shift.
struct FrozenBatchNorm {
  const OptionalTensor &gamma, &beta;
  const Tensor &mean, &var;
  double eps;
};

// Fills in the scale and the shift that bn is for args, a convolution of x, and holds their memory.
template <class Device>
class FoldedBatchNorm {
 public:
  FoldedBatchNorm(ConvForward& args, const FrozenBatchNorm& bn, const Tensor& x)
      : memory_(x, 2 * args.shape.k * vector_item_size(x)) {
    const int64_t k = args.shape.k;
    char* scale = static_cast<char*>(memory_.get());
    char* shift = scale + k * vector_item_size(x);
    const auto fixed = [&](const Tensor& t, const char* name) { return vector(OptionalTensor(t), x, k, name); };
    Device(x).fold({k, args.dtype, fixed(bn.mean, "running_mean"), fixed(bn.var, "running_var"),
                    vector(bn.gamma, x, k, "gamma"), vector(bn.beta, x, k, "beta"), bn.eps, scale, shift});
    args.scale = scale;
    args.shift = shift;
  }

 private:
  static int64_t vector_item_size(const Tensor& x) { return accumulation_type(x) == ScalarType::Double ? 8 : 4; }

  CallMemory<Device> memory_;
};

template <class Device>
Tensor temporal_conv_bn_frozen(const Tensor& x, const Tensor& weight, const OptionalTensor& gamma,
                               const OptionalTensor& beta, const Tensor& running_mean, const Tensor& running_var,
                               const OptionalTensor& residual, int64_t stride, int64_t padding, int64_t dilation,
                               double eps, bool relu, bool tf32) {
  const ConvShape s = conv_shape(x, weight, stride, padding, dilation);
  ConvForward args = affine_args(s, x, weight, std::nullopt, std::nullopt, residual, relu, tf32);
  const FoldedBatchNorm<Device> folded(args, {gamma, beta, running_mean, running_var, eps}, x);
  return run_forward<Device>(args, x);
}

// Fills in the results that are wanted, runs the backward and returns them; shared by the affine and the BatchNorm
// form.
template <class Device>
Gradients run_backward(ConvBackward args, const Tensor& x, const Tensor& weight, bool need_x, bool need_weight,
                       bool need_scale, bool need_shift, bool need_residual) {
  const ConvShape& s = args.shape;
  const Sizes out = output_sizes(s, x), in{s.n, s.c, s.t_in, x.size(3), x.size(4)};
  Tensor dx = need_x ? empty_channels_last(x, in) : nothing(x);
  Tensor dweight = need_weight ? empty_contiguous(weight) : nothing(x);
  Tensor dscale = need_scale ? empty_vector(x, s.k) : nothing(x);
  Tensor dshift = need_shift ? empty_vector(x, s.k) : nothing(x);
  Tensor dresidual = need_residual ? empty_channels_last(x, out) : nothing(x);
  if (need_x) args.dx = out_rows(dx);
  if (need_weight) args.dweight = dweight.data_ptr();
  if (need_scale) args.dscale = dscale.data_ptr();
  if (need_shift) args.dshift = dshift.data_ptr();
  if (need_residual) args.dresidual = out_rows(dresidual);
  Device(x).backward(args);
  return {dx, dweight, dscale, dshift, dresidual};
}

template <class Device>
Gradients temporal_conv_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                                 const OptionalTensor& y, int64_t stride, int64_t padding, int64_t dilation,
                                 bool need_x, bool need_weight, bool need_scale, bool need_shift, bool need_residual,
                                 bool tf32) {
  const ConvShape s = conv_shape(x, weight, stride, padding, dilation);
  ConvBackward args = backward_args(s, grad, x, weight, tf32);
  args.relu = y.has_value();
  args.scale = vector(scale, x, s.k, "scale");
  args.y = optional_rows(y, x, output_sizes(s, x), "y");
  return run_backward<Device>(args, x, weight, need_x, need_weight, need_scale, need_shift, need_residual);
}

// Convolution with batch statistics into `raw`, then the normalised result into `y`. Returns (raw, mean, invstd,
// unbiased_var).
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_normalised(const Tensor& x, const Tensor& weight, const ConvShape& s,
                                                           const OptionalTensor& gamma, const OptionalTensor& beta,
                                                           const Rows& residual, double eps, bool relu, bool tf32,
                                                           const OutRows& y) {
  Tensor raw = empty_channels_last(x, output_sizes(s, x));
  Tensor mean = empty_vector(x, s.k), invstd = empty_vector(x, s.k), unbiased_var = empty_vector(x, s.k);
  ConvForward args = conv_args(s, x, weight, tf32);
  args.y = out_rows(raw);
  Device device(x);
  device.forward_stats(args, {mean.data_ptr(), invstd.data_ptr(), unbiased_var.data_ptr(), eps});
  device.normalise({s.n, s.k, s.t_out, s.p, args.dtype, rows(raw, "raw"), mean.data_ptr(), invstd.data_ptr(),
                    vector(gamma, x, s.k, "gamma"), vector(beta, x, s.k, "beta"), residual, relu, y});
  return {raw, mean, invstd, unbiased_var};
}

template <class Device>
Normalised temporal_conv_bn(const Tensor& x, const Tensor& weight, const OptionalTensor& gamma,
                            const OptionalTensor& beta, const OptionalTensor& residual, int64_t stride, int64_t padding,
                            int64_t dilation, double eps, bool relu, bool tf32) {
  const ConvShape s = conv_shape(x, weight, stride, padding, dilation);
  const Sizes out = output_sizes(s, x);
  Tensor y = empty_channels_last(x, out);
  auto [raw, mean, invstd, unbiased_var] = conv_normalised<Device>(
      x, weight, s, gamma, beta, optional_rows(residual, x, out, "residual"), eps, relu, tf32, out_rows(y));
  return {y, raw, mean, invstd, unbiased_var};
}

template <class Device>
Gradients temporal_conv_bn_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                    const OptionalTensor& gamma, const OptionalTensor& beta,
                                    const OptionalTensor& residual, const Tensor& raw, const Tensor& mean,
                                    const Tensor& invstd, int64_t stride, int64_t padding, int64_t dilation, bool relu,
                                    bool need_x, bool need_weight, bool need_gamma, bool need_beta, bool need_residual,
                                    bool tf32) {
  const ConvShape s = conv_shape(x, weight, stride, padding, dilation);
  const Sizes out = output_sizes(s, x);
  ConvBackward args = backward_args(s, grad, x, weight, tf32);
  args.relu = relu;
  args.bn.raw = rows_of(raw, x, out, "raw");
  args.bn.mean = vector(mean, x, s.k, "mean");
  args.bn.invstd = vector(invstd, x, s.k, "invstd");
  args.bn.gamma = vector(gamma, x, s.k, "gamma");
  args.bn.beta = vector(beta, x, s.k, "beta");
  args.bn.residual = optional_rows(residual, x, out, "residual");
  return run_backward<Device>(args, x, weight, need_x, need_weight, need_gamma, need_beta, need_residual);
}

template <class Device>
void update_running_stats(std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                          std::optional<Tensor> num_batches_tracked, const Tensor& mean, const Tensor& unbiased_var,
                          std::optional<double> momentum) {
  RunningStats args{};
  args.k = mean.size(0);
  args.mean = vector(mean, mean, args.k, "mean");
  args.unbiased_var = vector(unbiased_var, mean, args.k, "unbiased_var");
  args.batch_is_double = mean.scalar_type() == ScalarType::Double;
  const auto running = [&](const std::optional<Tensor>& t, const char* name) -> void* {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == args.k && t->is_contiguous() && t->device() == mean.device(), name,
                    " must be a contiguous vector of ", args.k, " on the device of mean");
    args.running_dtype = dtype_of(*t, name);
    return t->data_ptr();
  };
  args.running_mean = running(running_mean, "running_mean");
  args.running_var = running(running_var, "running_var");
  STD_TORCH_CHECK(!running_mean || !running_var || running_mean->scalar_type() == running_var->scalar_type(),
                  "running_mean and running_var must share one dtype");
  if (num_batches_tracked) {
    STD_TORCH_CHECK(num_batches_tracked->numel() == 1 && num_batches_tracked->scalar_type() == ScalarType::Long &&
                        num_batches_tracked->device() == mean.device(),
                    "num_batches_tracked must be one int64 on the device of mean");
    args.num_batches_tracked = static_cast<int64_t*>(num_batches_tracked->data_ptr());
  }
  STD_TORCH_CHECK(momentum || num_batches_tracked, "momentum None needs num_batches_tracked");
  args.cumulative = !momentum;
  args.momentum = momentum.value_or(0.0);
  Device(mean).update_running(args);
}

template <class Device, class Library>
void register_temporal_conv(Library& m) {
  m.impl("temporal_conv", TORCH_BOX(&temporal_conv<Device>));
  m.impl("temporal_conv_pack", TORCH_BOX(&temporal_conv_pack<Device>));
  m.impl("temporal_conv_packed", TORCH_BOX(&temporal_conv_packed<Device>));
  m.impl("temporal_conv_backward", TORCH_BOX(&temporal_conv_backward<Device>));
  m.impl("temporal_conv_bn_frozen", TORCH_BOX(&temporal_conv_bn_frozen<Device>));
  m.impl("temporal_conv_bn", TORCH_BOX(&temporal_conv_bn<Device>));
  m.impl("temporal_conv_bn_backward", TORCH_BOX(&temporal_conv_bn_backward<Device>));
  m.impl("update_running_stats", TORCH_BOX(&update_running_stats<Device>));
}

}  // namespace slowfast_fast
