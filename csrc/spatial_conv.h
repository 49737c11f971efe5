// spatial_conv, and the spatial layer of a block in training, for any device that carries out primitives.h.
#pragma once
#include <torch/csrc/stable/library.h>

#include "images.h"

namespace slowfast_fast {

// All of a call but its result and what is added. weight (K, C, 1, 3, 3) may have any strides.
inline SpatialForward spatial_forward(const Tensor& x, const Tensor& weight) {
  SpatialForward args{};
  args.x = rows(x, "x");
  for (int64_t d = 1; d < 5; ++d) STD_TORCH_CHECK(x.size(d) >= 1, "x may be empty in N only");
  STD_TORCH_CHECK(weight.dim() == 5 && weight.size(0) >= 1, "weight must be (K, C, 1, 3, 3)");
  args.shape = {x.size(0), x.size(1), weight.size(0), x.size(2), x.size(3), x.size(4)};
  check_like(weight, x, "weight");
  check_sizes(weight, {args.shape.k, args.shape.c, 1, 3, 3}, "weight");
  args.dtype = dtype_of(x, "x");
  args.weight = weight.data_ptr();
  args.stride_k = weight.stride(0);
  args.stride_c = weight.stride(1);
  args.stride_h = weight.stride(3);
  args.stride_w = weight.stride(4);
  return args;
}

// The gradient of a convolution's input is the convolution of its result's with the channels of the weight exchanged
// and its rows and columns reversed.
inline SpatialForward spatial_dgrad(const Tensor& grad, const Tensor& weight) {
  SpatialForward args = spatial_forward(grad, torch::stable::transpose(weight, 0, 1));
  const int64_t last = 2 * (args.stride_h + args.stride_w) * static_cast<int64_t>(weight.element_size());
  args.weight = static_cast<const char*>(args.weight) + last;
  args.stride_h = -args.stride_h;
  args.stride_w = -args.stride_w;
  return args;
}

// Whether the device has kernels of its own for this layer of a block that are faster than a library's.
template <class Device>
bool runs_spatial(const Tensor& x, const Tensor& weight, const SpatialConv& conv) {
  if constexpr (Device::has_spatial)
    return conv.stride == 1 && conv.dilation == 1 && Device::multiplies_less(spatial_forward(x, weight));
  else return false;
}

inline Sizes result_sizes(const SpatialShape& s) { return {s.n, s.k, s.t, s.h, s.w}; }

template <class Device>
Tensor run_spatial(SpatialForward args, const Tensor& x) {
  const Tensor y = empty_channels_last(x, result_sizes(args.shape));
  args.y = out_rows(y);
  if constexpr (Device::has_spatial) Device(x).spatial(args);
  return y;
}

// In the layout of the weight.
template <class Device>
Tensor spatial_wgrad(const Tensor& grad, const Tensor& x, const Tensor& weight) {
  const SpatialForward of = spatial_forward(x, weight);
  const Tensor dweight = torch::stable::empty_like(weight);
  const SpatialWgrad args{of.shape,           of.dtype,           of.x,
                          rows(grad, "grad"), dweight.data_ptr(), dweight.stride(0),
                          dweight.stride(1),  dweight.stride(3),  dweight.stride(4)};
  if constexpr (Device::has_spatial) Device(x).spatial_wgrad(args);
  return dweight;
}

// By the device's own kernels or a library's.
template <class Device>
Tensor convolve_spatial(const Tensor& x, const Tensor& weight, const SpatialConv& conv) {
  if (runs_spatial<Device>(x, weight, conv)) return run_spatial<Device>(spatial_forward(x, weight), x);
  return convolve_images(x, weight, conv);
}

template <class Device>
ImageGradients convolve_spatial_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                         const SpatialConv& conv, bool need_x, bool need_weight) {
  if (!runs_spatial<Device>(x, weight, conv))
    return convolve_images_backward(grad, x, weight, conv, need_x, need_weight);
  ImageGradients gradients;
  if (need_x) gradients.x = run_spatial<Device>(spatial_dgrad(grad, weight), grad);
  if (need_weight) gradients.weight = spatial_wgrad<Device>(grad, x, weight);
  return gradients;
}

template <class Device>
Tensor spatial_conv_with(SpatialForward args, const Tensor& x, const OptionalTensor& shift,
                         const OptionalTensor& residual, bool relu) {
  args.shift = vector(shift, x, args.shape.k, "shift");
  args.residual = optional_rows(residual, x, result_sizes(args.shape), "residual");
  args.relu = relu;
  return run_spatial<Device>(args, x);
}

template <class Device>
Tensor spatial_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& shift, const OptionalTensor& residual,
                    bool relu) {
  return spatial_conv_with<Device>(spatial_forward(x, weight), x, shift, residual, relu);
}

// The weight as the device's kernels read it, bytes for spatial_conv_packed to be given for every x of this dtype.
template <class Device>
Tensor spatial_conv_pack(const Tensor& x, const Tensor& weight) {
  const SpatialForward args = spatial_forward(x, weight);
  const int64_t bytes = Device::packed_bytes(args);
  Tensor packed = empty<1>({bytes}, ScalarType::Byte, x.device());
  Device(x).pack(args, packed.data_ptr());
  return packed;
}

template <class Device>
Tensor spatial_conv_packed(const Tensor& x, const Tensor& weight, const Tensor& packed, const OptionalTensor& shift,
                           const OptionalTensor& residual, bool relu) {
  SpatialForward args = spatial_forward(x, weight);
  const int64_t bytes = Device::packed_bytes(args);
  STD_TORCH_CHECK(packed.numel() == bytes && packed.scalar_type() == ScalarType::Byte && packed.device() == x.device(),
                  "packed must be ", bytes, " bytes from spatial_conv_pack for this x and weight, got ",
                  packed.numel());
  args.packed = packed.data_ptr();
  return spatial_conv_with<Device>(args, x, shift, residual, relu);
}

template <class Device, class Library>
void register_spatial_conv(Library& m) {
  m.impl("spatial_conv", TORCH_BOX(&spatial_conv<Device>));
  m.impl("spatial_conv_pack", TORCH_BOX(&spatial_conv_pack<Device>));
  m.impl("spatial_conv_packed", TORCH_BOX(&spatial_conv_packed<Device>));
}

}  // namespace slowfast_fast
