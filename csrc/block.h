// The parts that the forward and the backward of bottleneck_bn share: the geometry of a residual block, its layers, and
// what a device does with one of them.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "images.h"
#include "products.h"
#include "tap_products.h"

namespace slowfast_fast {

// In T for a; in H and W for b, which has as much padding as dilation. The shortcut has the strides of both.
struct BlockGeometry {
  int64_t stride_a, padding_a, dilation_a;
  SpatialConv b;
};

struct BlockShape {
  ConvShape a, b, c, shortcut;  // b: all but its products, which are a library's; shortcut.k = 0 without one
  int64_t h, w, h_out, w_out;
  BlockGeometry geometry;

  Sizes sizes_a() const { return {a.n, a.k, a.t_out, h, w}; }
  Sizes sizes_out(int64_t channels) const { return {a.n, channels, a.t_out, h_out, w_out}; }
  // Whether the shortcut leaves positions of x out.
  bool subsamples() const { return geometry.stride_a > 1 || geometry.b.stride > 1; }
};

// Checks x and the weights; `layout` is what the device can read of a's.
inline BlockShape block_shape(const Tensor& x, const Tensor& weight_a, const Tensor& weight_b, const Tensor& weight_c,
                              const OptionalTensor& shortcut_weight, const BlockGeometry& g, WeightLayout layout) {
  const auto check_weight = [&](const Tensor& weight, const Sizes& sizes, const char* name) {
    check_like(weight, x, name);
    check_sizes(weight, sizes, name);
  };
  const auto check_pointwise = [&](const Tensor& weight, const Sizes& sizes, const char* name) {
    check_weight(weight, sizes, name);
    STD_TORCH_CHECK(weight.is_contiguous(), name, " must be contiguous");
  };
  BlockShape s{};
  s.a = conv_shape(x, weight_a, g.stride_a, g.padding_a, g.dilation_a, layout);
  for (int64_t d = 1; d < 5; ++d) STD_TORCH_CHECK(x.size(d) >= 1, "x may be empty in N only");
  STD_TORCH_CHECK(g.b.stride >= 1 && g.b.dilation >= 1, "stride and dilation must be positive");
  STD_TORCH_CHECK(weight_c.dim() == 5 && weight_c.size(0) >= 1, "weight_c must be (K, J, 1, 1, 1)");
  s.geometry = g;
  s.h = x.size(3);
  s.w = x.size(4);
  s.h_out = (s.h - 1) / g.b.stride + 1;
  s.w_out = (s.w - 1) / g.b.stride + 1;
  const int64_t j = s.a.k, k = weight_c.size(0);
  check_weight(weight_b, {j, j, 1, 3, 3}, "weight_b");
  check_pointwise(weight_c, {k, j, 1, 1, 1}, "weight_c");
  const auto pointwise = [&](int64_t in, int64_t out) -> ConvShape {
    return {s.a.n, in, out, s.a.t_out, s.a.t_out, s.h_out * s.w_out, 1, 1, 0, 1};
  };
  s.b = pointwise(j, j);
  s.c = pointwise(j, k);
  if (shortcut_weight) {
    check_pointwise(*shortcut_weight, {k, s.a.c, 1, 1, 1}, "shortcut_weight");
    STD_TORCH_CHECK((s.a.t_in - 1) / g.stride_a + 1 == s.a.t_out, "a and the shortcut must leave the same T");
    s.shortcut = pointwise(s.a.c, k);
  } else {
    STD_TORCH_CHECK(s.a.c == k && s.a.t_in == s.a.t_out && !s.subsamples(),
                    "without a shortcut x itself is added: C must be K, and T, H and W be kept");
  }
  return s;
}

inline Tensor empty_statistics(const Tensor& x, int64_t k) {
  return empty<2>({3, k}, accumulation_type(x), x.device());
}

// A convolution and the BatchNorm behind it.
struct NormedLayer {
  ConvShape shape;
  const void *weight, *gamma, *beta;
  void *mean, *invstd, *unbiased_var;  // the rows of a (3, k) tensor

  NormedLayer(const ConvShape& s, const Tensor& x, const Tensor& weights, const OptionalTensor& gammas,
              const OptionalTensor& betas, const Tensor& statistics)
      : shape(s),
        weight(weights.data_ptr()),
        gamma(vector(gammas, x, s.k, "gamma")),
        beta(vector(betas, x, s.k, "beta")) {
    STD_TORCH_CHECK(statistics.dim() == 2 && statistics.size(0) == 3 && statistics.size(1) == s.k &&
                        statistics.is_contiguous() && statistics.scalar_type() == accumulation_type(x) &&
                        statistics.device() == x.device(),
                    "statistics must be a contiguous (3, ", s.k, ") in the accumulation dtype, on the device of x");
    char* row = static_cast<char*>(statistics.data_ptr());
    const int64_t next = s.k * static_cast<int64_t>(statistics.element_size());
    mean = row;
    invstd = row + next;
    unbiased_var = row + 2 * next;
  }
};

// What the gradient past the last ReLU is formed from, and where its sums over rows go.
struct PastRelu {
  const Tensor &grad, &out, &sums;
};

template <class Device>
class Block {
 public:
  Block(const BlockShape& s, const Tensor& x, bool tf32)
      : s_(s), x_(x), dtype_(dtype_of(x, "x")), tf32_(tf32), device_(x) {}

  void convolve(const NormedLayer& layer, const Tensor& x, const Tensor& y) { device_.forward(forward(layer, x, y)); }

  // With the statistics of y: gathered on the way, or where the product is the library's by a pass over y, which costs
  // less than that product gains.
  void convolve(const NormedLayer& layer, const Tensor& x, const Tensor& weight, const Tensor& y, double eps) {
    if (by_library(layer.shape, x)) {
      multiply(as_matrix(x), transposed(pointwise_matrix(weight)), as_matrix(y));
      return statistics(layer, y, eps);
    }
    device_.forward_stats(forward(layer, x, y), {layer.mean, layer.invstd, layer.unbiased_var, eps});
  }

  // y = act(norm(conv(x)) + residual) of a pointwise layer. conv(x) itself is stored nowhere, or in the memory of y
  // until it is normalised.
  void convolve_normalised(const NormedLayer& layer, const Tensor& x, const Tensor& weight, const Rows& residual,
                           bool relu, const Tensor& y, double eps) {
    if constexpr (Device::has_recomputing) {
      if (Device::recomputes(layer.shape)) {
        ConvForward conv = forward(layer, x, y);
        conv.residual = residual;
        conv.relu = relu;
        return device_.forward_normalised(
            {conv, {layer.mean, layer.invstd, layer.unbiased_var, eps}, layer.gamma, layer.beta});
      }
    }
    convolve(layer, x, weight, y, eps);
    normalise(layer, y, residual, relu, y);
  }

  // The raw output of a pointwise layer once more, in memory of its own.
  Tensor convolve_again(const NormedLayer& layer, const Tensor& x, const Tensor& weight) {
    const Tensor raw = empty_channels_last(x_, {x.size(0), layer.shape.k, x.size(2), x.size(3), x.size(4)});
    if (by_library(layer.shape, x)) multiply(as_matrix(x), transposed(pointwise_matrix(weight)), as_matrix(raw));
    else convolve(layer, x, raw);
    return raw;
  }

  // Of what a library convolved.
  void statistics(const NormedLayer& layer, const Tensor& raw, double eps) {
    const ConvShape& s = layer.shape;
    device_.statistics(
        {s.n, s.k, s.t_out, s.p, dtype_, rows(raw, "raw"), {layer.mean, layer.invstd, layer.unbiased_var, eps}});
  }

  // y = act(norm(raw) + residual); y may be raw itself.
  void normalise(const NormedLayer& layer, const Tensor& raw, const Rows& residual, bool relu, const Tensor& y) {
    const ConvShape& s = layer.shape;
    device_.normalise({s.n, s.k, s.t_out, raw.size(3) * raw.size(4), dtype_, rows(raw, "raw"), layer.mean, layer.invstd,
                       layer.gamma, layer.beta, residual, relu, out_rows(y)});
  }

  // What the convolution after `layer` reads. It is made again for the backward, never kept.
  Tensor activated(const NormedLayer& layer, const Tensor& raw) {
    const Tensor y = empty_channels_last(x_, {raw.size(0), raw.size(1), raw.size(2), raw.size(3), raw.size(4)});
    normalise(layer, raw, {}, true, y);
    return y;
  }

  // The backward of a pointwise layer from g, the gradient of norm(conv(x)), whose memory holds something else
  // afterwards where `last` says that it may; dgamma is nullptr where it is not wanted. With `past`, g is yet to be
  // formed from it.
  void backward_to_input(const NormedLayer& layer, const Tensor& g, const Tensor& x, const Tensor& weight, void* dgamma,
                         const OptionalTensor& dx, const OptionalTensor& dweight, const PastRelu* past, bool last) {
    if constexpr (Device::has_recomputing) {
      if (Device::recomputes(layer.shape))
        return backward_recomputed(layer, g, x, weight, dgamma, dx, dweight, past, last);
    }
    if (past) past_relu(*past, g);
    if constexpr (Device::has_folded_backward) {
      if (Device::folds(layer.shape, dtype_)) return backward_folded(layer, g, x, dgamma, dx, dweight);
    }
    const Tensor raw = convolve_again(layer, x, weight);
    ConvBackward args = backward(layer, g, raw, false);
    args.dscale = dgamma;
    run_backward(args, x, weight, raw, dx, dweight);
  }

  // The backward of a layer but for what is wanted of it, which is for the caller to add.
  ConvBackward backward(const NormedLayer& layer, const Tensor& grad, const Tensor& raw, bool relu) const {
    ConvBackward args = products(layer, grad);
    args.relu = relu;
    args.bn = {rows(raw, "raw"), layer.mean, layer.invstd, layer.gamma, layer.beta, {}};
    return args;
  }

  // The backward of a layer that reads x: what `args` wants and, into those of dx and dweight that are wanted, its
  // products. The gradient of the convolution's output is formed once, in the memory of `draw`.
  void run_backward(ConvBackward args, const Tensor& x, const Tensor& weight, const Tensor& draw,
                    const OptionalTensor& dx, const OptionalTensor& dweight) {
    if (dx || dweight) args.dconv = out_rows(draw);
    const bool library = by_library(args.shape, x);
    const bool by_taps = dweight && Device::multiplies_taps(args.shape, dtype_) && is_matrix(x);
    if (dweight && !library && !by_taps) {
      args.x = rows(x, "x");
      args.dweight = dweight->data_ptr();
    }
    // The library's product cannot add to what is there.
    const bool library_dx = library && !args.dx_residual.data;
    if (dx && !library_dx) args.dx = out_rows(*dx);
    device_.backward(args);
    if (dx && library_dx) multiply(as_matrix(draw), pointwise_matrix(weight), as_matrix(*dx));
    if (dweight && library) multiply(transposed(as_matrix(draw)), as_matrix(x), pointwise_matrix(*dweight));
    if (by_taps) wgrad_by_taps(device_, draw, x, args.shape, *dweight);
  }

  // g = past.grad where past.out > 0, else 0, and its sums over rows.
  void past_relu(const PastRelu& past, const Tensor& g) {
    ConvBackward args{};
    args.shape = s_.c;
    args.dtype = dtype_;
    form(args, past, g);
    device_.backward(args);
  }

  Device& device() { return device_; }

  // x, or where the shortcut has a stride the positions of x that it sees, copied side by side.
  Tensor seen_by_shortcut() {
    if (!s_.subsamples()) return x_;
    const Tensor seen = empty_channels_last(x_, s_.sizes_out(s_.a.c));
    const Rows from = rows(x_, "x");
    for_frames(from, [&](int64_t n, int64_t frames) { copy(frames, strided(from, n), of_clip(out_rows(seen), n)); });
    return seen;
  }

  // The reverse, for gradients: `seen` goes where it came from, into zeros.
  Tensor spread(const Tensor& seen) {
    if (!s_.subsamples()) return seen;
    Tensor dx = empty_channels_last(x_, {s_.a.n, s_.a.c, s_.a.t_in, s_.h, s_.w});
    torch::stable::zero_(dx);
    const OutRows to = out_rows(dx);
    for_frames(to, [&](int64_t n, int64_t frames) { copy(frames, of_clip(rows(seen, "seen"), n), strided(to, n)); });
    return dx;
  }

 private:
  ConvForward forward(const NormedLayer& layer, const Tensor& x, const Tensor& y) const {
    return {layer.shape, dtype_, tf32_, rows(x, "x"), layer.weight, nullptr, nullptr, {}, false, out_rows(y)};
  }

  static void form(ConvBackward& args, const PastRelu& past, const Tensor& g) {
    args.grad = rows(past.grad, "grad");
    args.relu = true;
    args.y = rows(past.out, "out");
    args.dresidual = out_rows(g);
    args.dshift = past.sums.data_ptr();
  }

  void backward_recomputed(const NormedLayer& layer, const Tensor& g, const Tensor& x, const Tensor& weight,
                           void* dgamma, const OptionalTensor& dx, const OptionalTensor& dweight, const PastRelu* past,
                           bool last) {
    ConvBackward args = products(layer, g);
    if (past) form(args, *past, g);
    args.x = rows(x, "x");
    args.bn = {{}, layer.mean, layer.invstd, layer.gamma, nullptr, {}};
    args.dscale = dgamma;
    const bool forms = dx || dweight;
    const Tensor draw = forms && !last ? empty_channels_last(x_, s_.sizes_out(layer.shape.k)) : g;
    run_backward(args, x, weight, draw, dx, dweight);
  }

  // The backward of a layer's convolution alone.
  ConvBackward products(const NormedLayer& layer, const Tensor& grad) const {
    ConvBackward args{};
    args.shape = layer.shape;
    args.dtype = dtype_;
    args.tf32 = tf32_;
    args.grad = rows(grad, "grad");
    args.weight = layer.weight;
    return args;
  }

  void backward_folded(const NormedLayer& layer, const Tensor& grad, const Tensor& x, void* dgamma,
                       const OptionalTensor& dx, const OptionalTensor& dweight) {
    const ConvShape& s = layer.shape;
    FoldedBackward folded{s.n,
                          s.t_out,
                          s.p,
                          s.c,
                          s.k,
                          dtype_,
                          rows(grad, "grad"),
                          rows(x, "x"),
                          layer.weight,
                          layer.gamma,
                          layer.invstd,
                          dgamma,
                          dweight ? dweight->data_ptr() : nullptr,
                          {},
                          nullptr};
    if (!dx) return device_.folded_backward(folded);
    const Tensor scale = empty_vector(x_, s.k);
    folded.dx = out_rows(*dx);
    folded.scale = scale.data_ptr();
    device_.folded_backward(folded);
    ConvBackward args = products(layer, grad);
    args.scale = scale.data_ptr();
    args.dx = folded.dx;
    args.dx_residual = rows(*dx, "dx");
    device_.backward(args);
  }

  bool by_library(const ConvShape& s, const Tensor& x) const {
    return Device::library_multiplies(s, dtype_) && is_matrix(x);
  }

  // Calls f(first clip, frames) for the frames that the shortcut sees: once where those of all clips are evenly spaced.
  // (Rows of clips of one frame do not tell how far apart frames are.)
  template <typename Pointer, class F>
  void for_frames(const RowsOf<Pointer>& x, const F& f) const {
    const bool joined = s_.a.n > 1 && s_.a.t_out > 1 && x.stride_n == s_.a.t_out * s_.geometry.stride_a * x.stride_t;
    if (joined) return f(0, s_.a.n * s_.a.t_out);
    for (int64_t n = 0; n < s_.a.n; ++n) f(n, s_.a.t_out);
  }

  // Rows (frames, H', W') from a clip on: dense ones, and those of x that the shortcut sees.
  template <typename Pointer>
  RowsOf<Pointer> of_clip(const RowsOf<Pointer>& r, int64_t n) const {
    return {at(r, n), r.stride_t, s_.w_out * r.stride_p, r.stride_p};
  }
  template <typename Pointer>
  RowsOf<Pointer> strided(const RowsOf<Pointer>& r, int64_t n) const {
    const int64_t stride = s_.geometry.b.stride;
    return {at(r, n), s_.geometry.stride_a * r.stride_t, stride * s_.w * r.stride_p, stride * r.stride_p};
  }
  template <typename Pointer>
  Pointer at(const RowsOf<Pointer>& r, int64_t n) const {
    using Byte = std::conditional_t<std::is_same_v<Pointer, void*>, char, const char>;
    return static_cast<Byte*>(r.data) + n * r.stride_n * static_cast<int64_t>(x_.element_size());
  }
  void copy(int64_t frames, const Rows& from, const OutRows& to) {
    device_.copy({frames, s_.a.c, s_.h_out, s_.w_out, dtype_, from, to});
  }

  const BlockShape& s_;
  const Tensor& x_;
  Dtype dtype_;
  bool tf32_;
  Device device_;
};

}  // namespace slowfast_fast
