// bottleneck_bn, the training form of a residual block, and its backward, for any device that carries out primitives.h.
// x, the raw outputs of the two narrow convolutions, the statistics and the result are kept for the backward. The raw
// outputs of the wide convolutions, c and the shortcut's, live for the length of a call, or nowhere.
#pragma once
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "block.h"
#include "spatial_conv.h"
#include "unfolded.h"

namespace slowfast_fast {

using BlockOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
BlockOutputs bottleneck_bn(const Tensor& x, const Tensor& weight_a, const OptionalTensor& gamma_a,
                           const OptionalTensor& beta_a, const Tensor& weight_b, const OptionalTensor& gamma_b,
                           const OptionalTensor& beta_b, const Tensor& weight_c, const OptionalTensor& gamma_c,
                           const OptionalTensor& beta_c, const OptionalTensor& shortcut_weight,
                           const OptionalTensor& shortcut_gamma, const OptionalTensor& shortcut_beta, int64_t stride_a,
                           int64_t padding_a, int64_t dilation_a, int64_t stride, int64_t dilation, double eps_a,
                           double eps_b, double eps_c, double shortcut_eps, bool tf32) {
  const BlockShape s = block_shape(x, weight_a, weight_b, weight_c, shortcut_weight,
                                   {stride_a, padding_a, dilation_a, {stride, dilation}}, Device::weight_layout);
  Block<Device> block(s, x, tf32);
  const Tensor stats_a = empty_statistics(x, s.a.k), stats_b = empty_statistics(x, s.b.k),
               stats_c = empty_statistics(x, s.c.k);
  const NormedLayer a(s.a, x, weight_a, gamma_a, beta_a, stats_a), b(s.b, x, weight_b, gamma_b, beta_b, stats_b),
      c(s.c, x, weight_c, gamma_c, beta_c, stats_c);

  const Tensor raw_a = empty_channels_last(x, s.sizes_a());
  block.convolve(a, x, weight_a, raw_a, eps_a);
  const Tensor raw_b = convolve_spatial<Device>(block.activated(a, raw_a), weight_b, s.geometry.b);
  block.statistics(b, raw_b, eps_b);
  Tensor residual = x, shortcut_stats = nothing(x);
  if (shortcut_weight) {
    shortcut_stats = empty_statistics(x, s.c.k);
    const NormedLayer shortcut(s.shortcut, x, *shortcut_weight, shortcut_gamma, shortcut_beta, shortcut_stats);
    residual = empty_channels_last(x, s.sizes_out(s.c.k));
    block.convolve_normalised(shortcut, block.seen_by_shortcut(), *shortcut_weight, {}, false, residual, shortcut_eps);
  }
  const Tensor out = empty_channels_last(x, s.sizes_out(s.c.k));
  block.convolve_normalised(c, block.activated(b, raw_b), weight_c, rows(residual, "residual"), true, out, eps_c);
  return {out, raw_a, raw_b, stats_a, stats_b, stats_c, shortcut_stats};
}

// The gradients that a backward returns, in the order of the forward's tensors; bit i of `needs` asks for the i-th.
enum BlockGradient : int {
  kX,
  kWeightA,
  kGammaA,
  kBetaA,
  kWeightB,
  kGammaB,
  kBetaB,
  kWeightC,
  kGammaC,
  kBetaC,
  kShortcutWeight,
  kShortcutGamma,
  kShortcutBeta,
  kBlockGradients
};

class BlockNeeds {
 public:
  explicit BlockNeeds(int64_t bits) : bits_(bits) {}
  bool operator[](int gradient) const { return bits_ >> gradient & 1; }
  // Whether any gradient from `first` up to and without `last` is wanted.
  bool any(int first, int last) const { return bits_ >> first & ((1 << (last - first)) - 1); }

 private:
  int64_t bits_;
};

using BlockGradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
BlockGradients bottleneck_bn_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight_a, const OptionalTensor& gamma_a,
    const OptionalTensor& beta_a, const Tensor& weight_b, const OptionalTensor& gamma_b, const OptionalTensor& beta_b,
    const Tensor& weight_c, const OptionalTensor& gamma_c, const OptionalTensor& shortcut_weight,
    const OptionalTensor& shortcut_gamma, const Tensor& out, const Tensor& raw_a, const Tensor& raw_b,
    const Tensor& stats_a, const Tensor& stats_b, const Tensor& stats_c, const Tensor& shortcut_stats, int64_t stride_a,
    int64_t padding_a, int64_t dilation_a, int64_t stride, int64_t dilation, int64_t needs, bool tf32) {
  const BlockShape s = block_shape(x, weight_a, weight_b, weight_c, shortcut_weight,
                                   {stride_a, padding_a, dilation_a, {stride, dilation}}, Device::weight_layout);
  Block<Device> block(s, x, tf32);
  const NormedLayer a(s.a, x, weight_a, gamma_a, beta_a, stats_a), b(s.b, x, weight_b, gamma_b, beta_b, stats_b),
      c(s.c, x, weight_c, gamma_c, std::nullopt, stats_c);
  const BlockNeeds need(needs);
  const bool into_a = need.any(kX, kWeightB), into_b = into_a || need.any(kWeightB, kWeightC),
             into_c = into_b || need[kWeightC] || need[kGammaC];

  std::array<Tensor, kBlockGradients> d;
  for (Tensor& gradient : d) gradient = nothing(x);
  const auto vector_for = [&](int gradient, int64_t k) -> void* {
    if (!need[gradient]) return nullptr;
    d[gradient] = empty_vector(x, k);
    return d[gradient].data_ptr();
  };
  const auto weight_for = [&](int gradient, const Tensor& weight) -> OptionalTensor {
    if (need[gradient]) d[gradient] = torch::stable::empty_like(weight);
    return need[gradient] ? OptionalTensor(d[gradient]) : std::nullopt;
  };

  // The gradient past the last ReLU: that of both branches. Its sums are the gradients of both betas.
  Tensor g = empty_channels_last(x, s.sizes_out(s.c.k));
  const Tensor sums = empty_vector(x, s.c.k);
  const PastRelu past{grad, out, sums};
  const bool into_shortcut = shortcut_weight && (need[kX] || need.any(kShortcutWeight, kShortcutBeta));
  Tensor g_b = nothing(x);  // the gradient of what c read; then of what b wrote, in the same memory
  if (into_c) {
    if (into_b) g_b = empty_channels_last(x, s.sizes_out(s.a.k));
    const bool last = !into_shortcut && !need[kX];
    block.backward_to_input(c, g, block.activated(b, raw_b), weight_c, vector_for(kGammaC, s.c.k),
                            into_b ? OptionalTensor(g_b) : std::nullopt, weight_for(kWeightC, weight_c), &past, last);
  } else {
    block.past_relu(past, g);
  }
  if (need[kBetaC]) d[kBetaC] = sums;
  if (need[kShortcutBeta]) d[kShortcutBeta] = need[kBetaC] ? torch::stable::clone(sums) : sums;

  Tensor g_a = nothing(x);  // the gradient of what b read
  if (into_b) {
    ConvBackward args = block.backward(b, g_b, raw_b, true);
    args.dscale = vector_for(kGammaB, s.a.k);
    args.dshift = vector_for(kBetaB, s.a.k);
    args.dconv = out_rows(g_b);
    block.device().backward(args);
    const Tensor y = block.activated(a, raw_a);
    const bool unfolded = need[kWeightB] && Device::unfolds(s.b, dtype_of(x, "x"));
    if (unfolded) d[kWeightB] = unfolded_wgrad(block.device(), g_b, y, weight_b, s.geometry.b);
    if (into_a || !unfolded) {
      const ImageGradients gradients =
          convolve_spatial_backward<Device>(g_b, y, weight_b, s.geometry.b, into_a, need[kWeightB] && !unfolded);
      if (gradients.weight) d[kWeightB] = *gradients.weight;
      if (into_a) g_a = *gradients.x;
    }
    g_b = nothing(x);
  }
  if (into_shortcut) {
    const NormedLayer shortcut(s.shortcut, x, *shortcut_weight, shortcut_gamma, std::nullopt, shortcut_stats);
    OptionalTensor dx;
    if (need[kX]) dx = empty_channels_last(x, s.sizes_out(s.a.c));
    block.backward_to_input(shortcut, g, block.seen_by_shortcut(), *shortcut_weight, vector_for(kShortcutGamma, s.c.k),
                            dx, weight_for(kShortcutWeight, *shortcut_weight), nullptr, true);
    if (need[kX]) g = block.spread(*dx);
  }
  if (into_a) {
    ConvBackward args = block.backward(a, g_a, raw_a, true);
    args.dscale = vector_for(kGammaA, s.a.k);
    args.dshift = vector_for(kBetaA, s.a.k);
    OptionalTensor dx;
    if (need[kX]) {
      // g holds the gradient that x has from the shortcut; a adds its own to it.
      d[kX] = g;
      dx = g;
      args.dx_residual = rows(g, "g");
    }
    block.run_backward(args, x, weight_a, g_a, dx, weight_for(kWeightA, weight_a));
  }
  return {d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7], d[8], d[9], d[10], d[11], d[12]};
}

template <class Device, class Library>
void register_bottleneck_bn(Library& m) {
  m.impl("bottleneck_bn", TORCH_BOX(&bottleneck_bn<Device>));
  m.impl("bottleneck_bn_backward", TORCH_BOX(&bottleneck_bn_backward<Device>));
}

}  // namespace slowfast_fast
