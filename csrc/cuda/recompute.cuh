// A pointwise convolution with BatchNorm whose output r is stored nowhere: each pass that needs r multiplies again and
// makes what it is for in its epilogue. The forward is two products, one for the statistics and one for y. The backward
// is one for the sums over rows and one for r's gradient, beside which wgrad and dgrad are those of any convolution.
// A small product whose depth is split leaves its parts in workspace, as any does. A pass takes the kernels that its
// own tensors allow: where one that only it reads is misaligned, its r is rounded otherwise than that of the others, in
// TF32 by as much as TF32 rounds.
#pragma once
#include "forward_launch.cuh"
#include "gradient.cuh"

namespace slowfast_fast::cuda {

// scale (K): gamma * invstd.
template <class Acc>
__global__ void __launch_bounds__(kElementThreads) normalising_scale(NormalisedForward args, Acc* scale) {
  const int64_t k = first_element();
  if (k < args.conv.shape.k)
    scale[k] = static_cast<const Acc*>(args.stats.invstd)[k] * channel_or(args.gamma, k, Acc(1));
}

// What an epilogue makes the gradient of r of: scale * (r - mean) + shift + factor * g, each (K).
template <class Acc>
struct GradientCoefficients {
  Acc *scale, *shift, *factor;
};

// Those of factor * (g - mean(g) - xhat * mean(g * xhat)), factor = gamma * invstd, from the sums over rows.
template <class Acc>
__global__ void __launch_bounds__(kElementThreads)
    gradient_coefficients(ConvBackward args, const Acc* sum, const Acc* sum_xhat, GradientCoefficients<Acc> to) {
  const int64_t k = first_element();
  const ConvShape& s = args.shape;
  if (k >= s.k) return;
  const Acc inverse_rows = Acc(1) / Acc(s.n * s.t_out * s.p), invstd = static_cast<const Acc*>(args.bn.invstd)[k];
  to.factor[k] = invstd * channel_or(args.bn.gamma, k, Acc(1));
  to.scale[k] = -to.factor[k] * invstd * (sum_xhat[k] * inverse_rows);
  to.shift[k] = -to.factor[k] * (sum[k] * inverse_rows);
}

template <class Acc, class Queue>
void forward_normalised(Queue& queue, const NormalisedForward& args) {
  const ConvShape& s = args.conv.shape;
  ConvForward plain = args.conv;
  plain.residual = {};
  plain.relu = false;
  plain.y = {};
  forward(queue, plain, &args.stats);
  Acc* scale = queue.template workspace<Acc>(s.k);
  queue.launch(normalising_scale<Acc>, element_launch(s.k), args, scale);
  ConvForward normalised = args.conv;
  normalised.centre = args.stats.mean;
  normalised.scale = scale;
  normalised.shift = args.beta;
  forward(queue, normalised, nullptr);
}

// The backward of NormalisedForward up to the gradient of r: what is left of it is that of the convolution alone. There
// are rows.
template <class T, class Queue>
ConvBackward recomputed_gradient(Queue& queue, const ConvBackward& args) {
  using Acc = Accumulator<T>;
  const ConvShape& s = args.shape;
  const auto vector_for = [&](void* wanted) {
    return wanted ? static_cast<Acc*>(wanted) : queue.template workspace<Acc>(s.k);
  };
  Acc *sum = vector_for(args.dshift), *sum_xhat = vector_for(args.dscale);
  sum_gradient(queue, args, sum, sum_xhat);
  ConvForward of_conv = convolution_of(past_relu(args));
  if (args.dconv.data || args.dx.data || args.dweight) {
    Acc* vectors = queue.template workspace<Acc>(3 * s.k);
    const GradientCoefficients<Acc> coefficients{vectors, vectors + s.k, vectors + 2 * s.k};
    queue.launch(gradient_coefficients<Acc>, element_launch(s.k), args, sum, sum_xhat, coefficients);
    of_conv.centre = args.bn.mean;
    of_conv.scale = coefficients.scale;
    of_conv.shift = coefficients.shift;
    of_conv.residual_scale = coefficients.factor;
    of_conv.y = args.dconv.data ? args.dconv : gradient_workspace<T>(queue, s);
    forward(queue, of_conv, nullptr);
  }
  ConvBackward left = with_gradient(args, as_input(of_conv.y));
  left.dscale = left.dshift = nullptr;
  left.dresidual = left.dconv = {};
  return left;
}

}  // namespace slowfast_fast::cuda
