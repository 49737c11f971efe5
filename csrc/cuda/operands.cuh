// The operands of the three products: the convolution's input under its window, the weight, and the gradient.
#pragma once
#include "elementwise.cuh"

namespace slowfast_fast::cuda {

// x under the window of the convolution: outer is a row of the output, depth is tap * C + channel.
template <class T>
struct Window {
  static constexpr bool kDepthAdjacent = true;
  const ConvShape& s;
  const Rows& x;

  struct Row {
    const T* at;    // frame 0 of the clip, at the row's position
    int64_t frame;  // under tap 0; may lie outside of the clip
  };
  struct Tap {
    int64_t frames, channel;
  };

  __device__ Row outer(int64_t row) const {
    const Position at = position_of(row, s.t_out, s.p);
    return {row_at<T>(x, {at.n, 0, at.p}), at.t * s.stride - s.padding};
  }
  __device__ Tap depth(int64_t d) const { return {d / s.c * s.dilation, d % s.c}; }
  __device__ Accumulator<T> load(const Row& row, const Tap& tap) const {
    const int64_t t = row.frame + tap.frames;
    return t >= 0 && t < s.t_in ? Accumulator<T>(row.at[t * x.stride_t + tap.channel]) : Accumulator<T>(0);
  }
};

// The weight as the forward reads it: outer is an output channel, depth is tap * C + channel.
template <class T>
struct ForwardWeight {
  static constexpr bool kDepthAdjacent = true;
  const ConvShape& s;
  const T* weight;  // (K, C, kt)

  __device__ const T* outer(int64_t k) const { return weight + k * s.c * s.kt; }
  __device__ int64_t depth(int64_t d) const { return d % s.c * s.kt + d / s.c; }
  __device__ Accumulator<T> load(const T* of_k, int64_t offset) const { return Accumulator<T>(of_k[offset]); }
};

// The weight as dgrad reads it: outer is an input channel, depth is tap * K + output channel.
template <class T>
struct DgradWeight {
  static constexpr bool kDepthAdjacent = false;
  const ConvShape& s;
  const T* weight;

  __device__ const T* outer(int64_t c) const { return weight + c * s.kt; }
  __device__ int64_t depth(int64_t d) const { return d % s.k * s.c * s.kt + d / s.k; }
  __device__ Accumulator<T> load(const T* of_c, int64_t offset) const { return Accumulator<T>(of_c[offset]); }
};

// The gradient on its way back from the op's output, read and recomputed element by element.
//   affine: y = act(scale * conv + shift + residual)
//   BatchNorm: y = act(gamma * xhat + beta + residual), with the sums over all rows of g and of g * xhat
template <class T>
class OutputGradient {
 public:
  using Acc = Accumulator<T>;

  // The sums, (K), are read by before_factor in the BatchNorm form only.
  __device__ OutputGradient(const ConvBackward& args, const Acc* sum, const Acc* sum_xhat)
      : args_(args),
        sum_(sum),
        sum_xhat_(sum_xhat),
        inverse_rows_(Acc(1) / Acc(args.shape.n * args.shape.t_out * args.shape.p)) {}

  __device__ bool normalises() const { return args_.bn.raw.data; }

  // Past the ReLU, whose mask is the sign of the output as it was stored. NaN passes, as in torch's threshold_backward.
  __device__ Acc masked(const Position& at, int64_t k) const {
    if (args_.relu) {
      const T y = normalises() ? T(normalised<T>(args_.bn, at, k)) : row_at<T>(args_.y, at)[k];
      if (Acc(y) <= 0) return Acc(0);
    }
    return Acc(row_at<T>(args_.grad, at)[k]);
  }

  // With respect to the convolution's output, but for factor(k).
  __device__ Acc before_factor(const Position& at, int64_t k) const {
    const Acc g = masked(at, k);
    if (!normalises()) return g;
    const Acc centred = g - sum_[k] * inverse_rows_ - xhat<T>(args_.bn, at, k) * (sum_xhat_[k] * inverse_rows_);
    return centred * static_cast<const Acc*>(args_.bn.invstd)[k];
  }

  __device__ Acc factor(int64_t k) const { return channel_or(normalises() ? args_.bn.gamma : args_.scale, k, Acc(1)); }

 private:
  const ConvBackward& args_;
  const Acc *sum_, *sum_xhat_;
  Acc inverse_rows_;
};

// As dgrad reads it: outer is a row of the input, depth is tap * K + output channel.
template <class T>
struct DgradGradient {
  static constexpr bool kDepthAdjacent = true;
  const ConvShape& s;
  const OutputGradient<T>& gradient;

  struct Tap {
    int64_t frames, channel;
  };

  __device__ Position outer(int64_t row) const { return position_of(row, s.t_in, s.p); }
  __device__ Tap depth(int64_t d) const { return {d / s.k * s.dilation, d % s.k}; }
  __device__ Accumulator<T> load(const Position& at, const Tap& tap) const {
    const int64_t start = at.t + s.padding - tap.frames;  // of the window that sees this frame under this tap
    const int64_t t = start / s.stride;
    if (start < 0 || start % s.stride != 0 || t >= s.t_out) return Accumulator<T>(0);
    return gradient.factor(tap.channel) * gradient.before_factor({at.n, t, at.p}, tap.channel);
  }
};

// As wgrad reads it: outer is an output channel, depth is a row of the output.
template <class T>
struct WgradGradient {
  static constexpr bool kDepthAdjacent = false;
  const ConvShape& s;
  const OutputGradient<T>& gradient;

  __device__ int64_t outer(int64_t k) const { return k; }
  __device__ Position depth(int64_t row) const { return position_of(row, s.t_out, s.p); }
  __device__ Accumulator<T> load(int64_t k, const Position& at) const { return gradient.before_factor(at, k); }
};

}  // namespace slowfast_fast::cuda
