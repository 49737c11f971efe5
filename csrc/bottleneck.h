// bottleneck, for any device that carries out primitives.h.
#pragma once
#include <torch/csrc/stable/library.h>

#include "checks.h"

namespace slowfast_fast {

// A contiguous (out, in, kt, kh, kw) of the dtype and device of x.
inline const void* bottleneck_weight(const Tensor& weight, const Tensor& x, const Sizes& sizes, const char* name) {
  check_like(weight, x, name);
  check_sizes(weight, sizes, name);
  STD_TORCH_CHECK(weight.is_contiguous(), name, " must be contiguous");
  return weight.data_ptr();
}

// All of a call but its result.
inline Bottleneck bottleneck_block(const Tensor& x, const Tensor& weight_a, const Tensor& shift_a,
                                   const Tensor& weight_b, const Tensor& shift_b, const Tensor& weight_c,
                                   const Tensor& shift_c, const OptionalTensor& shortcut_weight,
                                   const OptionalTensor& shortcut_shift, int64_t padding, int64_t stride,
                                   int64_t dilation, bool tf32) {
  Bottleneck args{};
  args.x = rows(x, "x");
  for (int64_t d = 1; d < 5; ++d) STD_TORCH_CHECK(x.size(d) >= 1, "x may be empty in N only");
  STD_TORCH_CHECK(weight_a.dim() == 5 && weight_c.dim() == 5, "weights must be (out, in, kt, kh, kw)");
  args.n = x.size(0);
  args.c = x.size(1);
  args.j = weight_a.size(0);
  args.k = weight_c.size(0);
  args.t = x.size(2);
  args.h = x.size(3);
  args.w = x.size(4);
  args.kt = weight_a.size(2);
  args.padding = padding;
  args.stride = stride;
  args.dilation = dilation;
  STD_TORCH_CHECK(args.j >= 1 && args.k >= 1, "weight_a and weight_c must have output channels");
  STD_TORCH_CHECK(padding >= 0 && args.kt == 2 * padding + 1, "weight_a and padding must keep T");
  STD_TORCH_CHECK((stride == 1 || stride == 2) && (dilation == 1 || dilation == 2),
                  "stride and dilation must be 1 or 2");
  args.dtype = dtype_of(x, "x");
  args.tf32 = tf32;
  args.weight_a = bottleneck_weight(weight_a, x, {args.j, args.c, args.kt, 1, 1}, "weight_a");
  args.weight_b = bottleneck_weight(weight_b, x, {args.j, args.j, 1, 3, 3}, "weight_b");
  args.weight_c = bottleneck_weight(weight_c, x, {args.k, args.j, 1, 1, 1}, "weight_c");
  args.shift_a = vector(OptionalTensor(shift_a), x, args.j, "shift_a");
  args.shift_b = vector(OptionalTensor(shift_b), x, args.j, "shift_b");
  args.shift_c = vector(OptionalTensor(shift_c), x, args.k, "shift_c");
  STD_TORCH_CHECK(shortcut_weight.has_value() == shortcut_shift.has_value(),
                  "shortcut_weight and shortcut_shift must be given together");
  if (shortcut_weight) {
    args.weight_shortcut = bottleneck_weight(*shortcut_weight, x, {args.k, args.c, 1, 1, 1}, "shortcut_weight");
    args.shift_shortcut = vector(shortcut_shift, x, args.k, "shortcut_shift");
  } else {
    STD_TORCH_CHECK(args.c == args.k && stride == 1, "without a shortcut x itself is added: C must be K and stride 1");
  }
  return args;
}

template <class Device>
Tensor bottleneck(const Tensor& x, const Tensor& weight_a, const Tensor& shift_a, const Tensor& weight_b,
                  const Tensor& shift_b, const Tensor& weight_c, const Tensor& shift_c,
                  const OptionalTensor& shortcut_weight, const OptionalTensor& shortcut_shift, int64_t padding,
                  int64_t stride, int64_t dilation, bool tf32) {
  Bottleneck args = bottleneck_block(x, weight_a, shift_a, weight_b, shift_b, weight_c, shift_c, shortcut_weight,
                                     shortcut_shift, padding, stride, dilation, tf32);
  Tensor y = empty_channels_last(x, {args.n, args.k, args.t, args.h_out(), args.w_out()});
  args.y = out_rows(y);
  Device(x).bottleneck(args);
  return y;
}

template <class Device>
void bottleneck_out(const Tensor& out, const Tensor& x, const Tensor& weight_a, const Tensor& shift_a,
                    const Tensor& weight_b, const Tensor& shift_b, const Tensor& weight_c, const Tensor& shift_c,
                    const OptionalTensor& shortcut_weight, const OptionalTensor& shortcut_shift, int64_t padding,
                    int64_t stride, int64_t dilation, bool tf32) {
  Bottleneck args = bottleneck_block(x, weight_a, shift_a, weight_b, shift_b, weight_c, shift_c, shortcut_weight,
                                     shortcut_shift, padding, stride, dilation, tf32);
  check_like(out, x, "out");
  check_sizes(out, {args.n, args.k, args.t, args.h_out(), args.w_out()}, "out");
  args.y = out_rows(out);
  Device(x).bottleneck(args);
}

template <class Device, class Library>
void register_bottleneck(Library& m) {
  m.impl("bottleneck", TORCH_BOX(&bottleneck<Device>));
  m.impl("bottleneck_out", TORCH_BOX(&bottleneck_out<Device>));
}

}  // namespace slowfast_fast
