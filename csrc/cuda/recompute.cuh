// A pointwise convolution with BatchNorm whose output r is stored nowhere: each pass that needs r multiplies again and
// makes what it is for in its epilogue. The forward is two products, one for the statistics and one for y. The backward
// is one for the sums over rows and one for r's gradient, beside which wgrad and dgrad are those of any convolution.
#pragma once
#include "forward_launch.cuh"
#include "gradient.cuh"

namespace slowfast_fast::cuda {

// What an epilogue makes of r and of what it reads beside it: scale * r + shift + factor * residual, each (K).
template <class Acc>
struct Coefficients {
  Acc *scale, *shift, *factor;

  template <class Queue>
  static Coefficients workspace(Queue& queue, int64_t k) {
    Acc* of = queue.template workspace<Acc>(3 * k);
    return {of, of + k, of + 2 * k};
  }
};

// Of norm(r).
template <class Acc>
__global__ void __launch_bounds__(kElementThreads) normalising_coefficients(Normalise args, Coefficients<Acc> to) {
  const int64_t k = first_element();
  if (k >= args.k) return;
  const auto norm = ChannelNorm<Acc>::of(args, k);
  to.scale[k] = norm.invstd * norm.gamma;
  to.shift[k] = fma(-norm.mean, to.scale[k], norm.beta);
}

// Of r's gradient, factor * (g - mean(g) - xhat * mean(g * xhat)) with factor = gamma * invstd, from the sums over
// rows.
template <class Acc>
__global__ void __launch_bounds__(kElementThreads)
    gradient_coefficients(ConvBackward args, const Acc* sum, const Acc* sum_xhat, Coefficients<Acc> to) {
  const int64_t k = first_element();
  const ConvShape& s = args.shape;
  if (k >= s.k) return;
  const auto norm = ChannelNorm<Acc>::of(args.bn, k);
  const Acc inverse_rows = Acc(1) / Acc(s.n * s.t_out * s.p);
  to.factor[k] = norm.invstd * norm.gamma;
  to.scale[k] = -to.factor[k] * norm.invstd * (sum_xhat[k] * inverse_rows);
  to.shift[k] = fma(-norm.mean, to.scale[k], -to.factor[k] * (sum[k] * inverse_rows));
}

template <class Acc, class Queue>
void forward_normalised(Queue& queue, const NormalisedForward& args) {
  const ConvShape& s = args.conv.shape;
  ConvForward plain = args.conv;
  plain.residual = {};
  plain.relu = false;
  plain.y = {};
  forward(queue, plain, &args.stats);
  const auto coefficients = Coefficients<Acc>::workspace(queue, s.k);
  Normalise norm{};
  norm.k = s.k;
  norm.mean = args.stats.mean, norm.invstd = args.stats.invstd;
  norm.gamma = args.gamma, norm.beta = args.beta;
  queue.launch(normalising_coefficients<Acc>, element_launch(s.k), norm, coefficients);
  ConvForward normalised = args.conv;
  normalised.scale = coefficients.scale;
  normalised.shift = coefficients.shift;
  forward(queue, normalised, nullptr);
}

// The backward of NormalisedForward up to r's gradient: what is left of it is that of the convolution alone. With a
// ReLU and anything left, dresidual is wanted.
template <class T, class Queue>
ConvBackward recomputed_gradient(Queue& queue, const ConvBackward& args) {
  using Acc = Accumulator<T>;
  const ConvShape& s = args.shape;
  const auto vector_for = [&](void* wanted) {
    return wanted ? static_cast<Acc*>(wanted) : queue.template workspace<Acc>(s.k);
  };
  Acc *sum = vector_for(args.dshift), *sum_xhat = vector_for(args.dscale);
  sum_gradient(queue, args, sum, sum_xhat);
  ConvBackward left{};
  left.shape = s;
  left.dtype = args.dtype;
  left.tf32 = args.tf32;
  left.x = args.x;
  left.weight = args.weight;
  left.dx = args.dx;
  left.dx_residual = args.dx_residual;
  left.dweight = args.dweight;
  if (!args.dconv.data && !args.dx.data && !args.dweight) return left;
  const auto coefficients = Coefficients<Acc>::workspace(queue, s.k);
  queue.launch(gradient_coefficients<Acc>, element_launch(s.k), args, sum, sum_xhat, coefficients);
  ConvForward of_conv = convolution_of(past_relu(args));
  of_conv.scale = coefficients.scale;
  of_conv.shift = coefficients.shift;
  of_conv.residual_scale = coefficients.factor;
  of_conv.y = args.dconv.data ? args.dconv : gradient_workspace<T>(queue, s);
  forward(queue, of_conv, nullptr);
  left.grad = as_input(of_conv.y);
  return left;
}

}  // namespace slowfast_fast::cuda
