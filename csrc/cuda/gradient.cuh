// The gradient on its way back from the op's output to the convolution's, past ReLU and BatchNorm, in packs of
// channels: how a kernel forms it as it reads, and the pass that writes it for those that read it several times.
#pragma once
#include "operands.cuh"
#include "rowwise.cuh"

namespace slowfast_fast::cuda {

inline Rows as_input(const OutRows& rows) { return {rows.data, rows.stride_n, rows.stride_t, rows.stride_p}; }

// The same backward with the gradient past the ReLU as what is given, where the residual's gradient has it already.
inline ConvBackward past_relu(const ConvBackward& args) {
  ConvBackward past = args;
  if (!args.relu || !args.dresidual.data) return past;
  past.relu = false;
  past.grad = as_input(args.dresidual);
  return past;
}

// Whether the gradient of the convolution's output (in the affine form, before its scale) is another one than what is
// given, and whether the ReLU's mask then needs the residual.
inline bool gradient_changes(const ConvBackward& args) { return args.bn.raw.data || args.relu; }
__host__ __device__ inline bool residual_masks(const ConvBackward& args) {
  return args.bn.raw.data && args.relu && args.bn.residual.data;
}

// The same backward with that gradient as what is given: neither ReLU nor BatchNorm is left.
inline ConvBackward with_gradient(const ConvBackward& args, const Rows& gradient) {
  ConvBackward plain = args;
  plain.relu = false;
  plain.bn = {};
  plain.y = {};
  plain.grad = gradient;
  return plain;
}

// What is read beside the gradient that is given: the convolution's output, or that of the op for its mask.
__host__ __device__ inline const Rows& beside_gradient(const ConvBackward& args) {
  return args.bn.raw.data ? args.bn.raw : args.y;
}

// One channel's part in it.
struct alignas(16) ChannelGradient {
  ChannelNorm<float> norm;
  float mean, mean_xhat;  // over all rows: of the gradient past the ReLU, and of it times xhat

  // sum and sum_xhat: (K), BatchNorm only.
  __device__ static ChannelGradient of(const ConvBackward& args, const float* sum, const float* sum_xhat, int64_t k) {
    if (!args.bn.raw.data) return {};
    const ConvShape& s = args.shape;
    const float inverse_rows = 1.f / float(s.n * s.t_out * s.p);
    return {ChannelNorm<float>::of(args.bn, k), sum[k] * inverse_rows, sum_xhat[k] * inverse_rows};
  }
};

// grad becomes what the convolution's output gets. beside: see beside_gradient; residual only where it masks.
template <class T>
__device__ void form_gradient(const ConvBackward& args, const ChannelGradient (&channels)[Pack<T>::kSize],
                              Pack<T>& grad, const Pack<T>& beside, const Pack<T>& residual) {
  const bool normalises = args.bn.raw.data, masks = residual_masks(args);
#pragma unroll
  for (int e = 0; e < Pack<T>::kSize; ++e) {
    const ChannelGradient& channel = channels[e];
    const float raw = float(beside.of[e]);
    float y = normalises ? channel.norm(raw) : raw;
    if (masks) y += float(residual.of[e]);
    if (args.relu && float(T(y)) <= 0) grad.of[e] = T(0.f);
    if (!normalises) continue;
    const float centred = float(grad.of[e]) - channel.mean - channel.norm.xhat(raw) * channel.mean_xhat;
    grad.of[e] = T(centred * (channel.norm.invstd * channel.norm.gamma));
  }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSM)
    output_gradient(ConvBackward args, RowPlan plan, const float* sum, const float* sum_xhat, OutRows out) {
  const int64_t channel = plan.channel();
  if (channel >= args.shape.k) return;
  ChannelGradient channels[Pack<T>::kSize];
  for (int e = 0; e < Pack<T>::kSize; ++e) channels[e] = ChannelGradient::of(args, sum, sum_xhat, channel + e);
  plan.walk<kGradientLoads>([&](const Position& at, int64_t left) {
    Pack<T> grad[kGradientLoads], beside[kGradientLoads], residual[kGradientLoads];
    plan.load(grad, args.grad, at, left, channel);
    plan.load(beside, beside_gradient(args), at, left, channel);
    if (residual_masks(args)) plan.load(residual, args.bn.residual, at, left, channel);
#pragma unroll
    for (int i = 0; i < kGradientLoads; ++i) {
      if (i * plan.lanes >= left) break;
      form_gradient(args, channels, grad[i], beside[i], residual[i]);
    }
    plan.store(grad, out, at, left, channel);
  });
}

// The same one value at a time, for rows that cannot be read in packs, and for float64.
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    output_gradient_kernel(ConvBackward args, const Accumulator<T>* sum, const Accumulator<T>* sum_xhat, OutRows out) {
  const ConvShape& s = args.shape;
  const OutputGradient<T> gradient(args, sum, sum_xhat);
  const int64_t elements = s.n * s.t_out * s.p * s.k;
  for (int64_t i = first_element(); i < elements; i += element_step()) {
    const Position at = position_of(i / s.k, s.t_out, s.p);
    const int64_t k = i % s.k;
    const Accumulator<T> factor = gradient.normalises() ? gradient.factor(k) : Accumulator<T>(1);
    row_at<T>(out, at)[k] = T(factor * gradient.before_factor(at, k));
  }
}

// Dense rows for the gradient of the convolution's output.
template <class T, class Queue>
OutRows gradient_workspace(Queue& queue, const ConvShape& s) {
  return {queue.template workspace<T>(rows_out(s) * s.k), s.t_out * s.p * s.k, s.p * s.k, s.k};
}

// The gradient of the convolution's output, written in one pass over what it is formed from, to dconv or else to
// workspace, unless it is there already. There are rows.
template <class T, class Queue>
ConvBackward with_output_gradient(Queue& queue, const ConvBackward& args, const Accumulator<T>* sum,
                                  const Accumulator<T>* sum_xhat) {
  if (!gradient_changes(args)) return args;
  const OutRows gradient = args.dconv.data ? args.dconv : gradient_workspace<T>(queue, args.shape);
  const ConvBackward formed = with_gradient(args, as_input(gradient));
  if constexpr (!std::is_same_v<T, double>) {
    if (!why_not_rows<T>(args)) {
      const RowPlan rows = gradient_plan<T>(args);
      queue.launch(output_gradient<T>, row_launch(rows, 0), args, rows, sum, sum_xhat, gradient);
      return formed;
    }
  }
  queue.launch(output_gradient_kernel<T>, element_launch(rows_out(args.shape) * args.shape.k), args, sum, sum_xhat,
               gradient);
  return formed;
}

}  // namespace slowfast_fast::cuda
