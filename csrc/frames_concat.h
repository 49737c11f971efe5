// Lateral connections that only move frames: `taps` of every alpha fast frames go side by side into the channels behind
// the slow pathway's. Written once for any device that carries out primitives.h.
#pragma once
#include <type_traits>

#include "wide.h"

namespace slowfast_fast {

// Frame alpha * t + j of fast, for j < taps, in channels [j * C, (j + 1) * C) of frame t.
struct Frames {
  const Tensor& fast;
  int64_t alpha, taps;

  int64_t channels() const { return taps * fast.size(1); }

  int64_t count() const {
    STD_TORCH_CHECK(fast.dim() == 5, "fast must be (N, C, T, H, W), got ", fast.dim(), " dimensions");
    STD_TORCH_CHECK(taps >= 1 && taps <= alpha, "taps must be from 1 to alpha");
    STD_TORCH_CHECK(fast.size(2) >= taps, "fast has fewer frames than taps");
    return (fast.size(2) - taps) / alpha + 1;
  }
};

// The fast frames that tap j reads or, in the backward, writes, and the channels that it has in the other tensor.
template <typename Pointer>
RowsOf<Pointer> frames_of_tap(RowsOf<Pointer> r, const Frames& f, int64_t j) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  r.data = static_cast<Byte*>(r.data) + j * r.stride_t * static_cast<int64_t>(f.fast.element_size());
  r.stride_t *= f.alpha;
  return r;
}

template <typename Pointer>
RowsOf<Pointer> channels_of_tap(RowsOf<Pointer> r, const Frames& f, int64_t j) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  r.data = static_cast<Byte*>(r.data) + j * f.fast.size(1) * static_cast<int64_t>(f.fast.element_size());
  return r;
}

template <class Device>
void copy_frames(const Frames& f, const OutRows& to) {
  const int64_t p = f.fast.size(3) * f.fast.size(4);
  for (int64_t j = 0; j < f.taps; ++j)
    Device(f.fast).copy({f.fast.size(0), f.fast.size(1), f.count(), p, dtype_of(f.fast, "fast"),
                         frames_of_tap(rows(f.fast, "fast"), f, j), channels_of_tap(to, f, j)});
}

// A new tensor with the frames behind c_slow channels that are left to the caller, which has `frames` frames of h x w
// in them.
template <class Device>
Tensor with_frames(const Frames& f, const Tensor& x, int64_t c_slow, int64_t frames, int64_t h, int64_t w) {
  check_like(f.fast, x, "fast");
  check_sizes(f.fast, {x.size(0), f.fast.size(1), f.fast.size(2), h, w}, "fast");
  STD_TORCH_CHECK(f.count() == frames, "fast has frames for ", f.count(), ", the slow pathway has ", frames);
  Tensor out = empty_channels_last(x, {x.size(0), c_slow + f.channels(), frames, h, w});
  copy_frames<Device>(f, channel_slice(out, c_slow));
  return out;
}

template <class Device>
Tensor frames_concat(const Tensor& slow, const Tensor& fast, int64_t alpha, int64_t taps) {
  STD_TORCH_CHECK(slow.dim() == 5, "slow must be (N, C, T, H, W), got ", slow.dim(), " dimensions");
  const int64_t c = slow.size(1), t = slow.size(2), h = slow.size(3), w = slow.size(4);
  Tensor out = with_frames<Device>({fast, alpha, taps}, slow, c, t, h, w);
  Device(slow).copy({slow.size(0), c, t, h * w, dtype_of(slow, "slow"), rows(slow, "slow"), channel_slice(out, 0)});
  return out;
}

// The gradient of fast, of t_fast frames, from that of its channels in the result. Frames that nobody took get 0.
template <class Device>
Tensor frames_concat_backward(const Tensor& grad, int64_t t_fast, int64_t alpha, int64_t taps) {
  STD_TORCH_CHECK(grad.dim() == 5, "grad must be (N, C, T, H, W), got ", grad.dim(), " dimensions");
  STD_TORCH_CHECK(taps >= 1 && grad.size(1) % taps == 0, "grad must have taps times the channels of fast");
  const int64_t n = grad.size(0), c = grad.size(1) / taps, t = grad.size(2), h = grad.size(3), w = grad.size(4);
  Tensor dfast = empty_channels_last(grad, {n, c, t_fast, h, w});
  const Frames f{dfast, alpha, taps};
  STD_TORCH_CHECK(f.count() == t, "t_fast frames give ", f.count(), ", grad has ", t);
  if (t * taps != t_fast) torch::stable::zero_(dfast);
  for (int64_t j = 0; j < taps; ++j)
    Device(grad).copy({n, c, t, h * w, dtype_of(grad, "grad"), channels_of_tap(rows(grad, "grad"), f, j),
                       frames_of_tap(out_rows(dfast), f, j)});
  return dfast;
}

template <class Device>
Tensor temporal_conv_frames_concat(const Tensor& x, const Tensor& weight, const OptionalTensor& shift,
                                   const OptionalTensor& residual, int64_t stride, int64_t padding, int64_t dilation,
                                   bool relu, const Tensor& fast, int64_t alpha, int64_t taps, bool tf32) {
  const ConvShape s = conv_shape(x, weight, stride, padding, dilation);
  const ConvForward args = affine_args(s, x, weight, std::nullopt, shift, residual, relu, tf32);
  Tensor out = with_frames<Device>({fast, alpha, taps}, x, s.k, s.t_out, x.size(3), x.size(4));
  forward_into<Device>(out, 0, args, x);
  return out;
}

template <class Device>
Tensor max_pool_frames_concat(const Tensor& x, int64_t kernel, int64_t stride, int64_t padding, const Tensor& fast,
                              int64_t alpha, int64_t taps) {
  MaxPool pool = max_pool_args(x, kernel, stride, padding);
  Tensor out = with_frames<Device>({fast, alpha, taps}, x, pool.c, pool.t, pool.h_out, pool.w_out);
  pool.y = channel_slice(out, 0);
  Device(x).max_pool(pool);
  return out;
}

template <class Device, class Library>
void register_frames_concat(Library& m) {
  m.impl("frames_concat", TORCH_BOX(&frames_concat<Device>));
  m.impl("frames_concat_backward", TORCH_BOX(&frames_concat_backward<Device>));
  m.impl("temporal_conv_frames_concat", TORCH_BOX(&temporal_conv_frames_concat<Device>));
  m.impl("max_pool_frames_concat", TORCH_BOX(&max_pool_frames_concat<Device>));
}

}  // namespace slowfast_fast
