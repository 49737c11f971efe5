// Which convolutions the narrow kernels take, and their launches.
#pragma once
#include "narrow.cuh"

namespace slowfast_fast::cuda::narrow {

constexpr int64_t kMostChannels = 128;  // of input and output: from there on, tiles in shared memory reuse more
constexpr int64_t kMostSlices = 4;  // blocks that read the same rows for different output channels, all but one from L2
constexpr size_t kMostWeightBytes =
    28 << 10;                           // every block gathers it: more would take longer than the rows of a small batch
constexpr int64_t kWantedItems = 8192;  // four turns for the 16 warps of each SM of the largest GPUs
constexpr int kLeastOutputs = 4;        // of an item that reads frames which its neighbours read too

template <class T, int positions, int slots, class F>
bool with_tiles(const Conv&, const F&) {
  return false;
}

// Calls f(Shape, bytes of its fragments) with the first of these numbers of tiles that suits, and says whether there is
// one. The largest stand first: each slice of the output channels reads all of x.
template <class T, int positions, int slots, int tiles, int... fewer, class F>
bool with_tiles(const Conv& conv, const F& f) {
  using Candidate = Shape<T, positions, tiles, slots>;
  const size_t bytes = size_t(conv.taps) * ceil_div(conv.in, Candidate::kIn) * tiles * kWarp * sizeof(Words);
  if (conv.out % Candidate::kOut != 0 || conv.out / Candidate::kOut > kMostSlices || bytes > kMostWeightBytes)
    return with_tiles<T, positions, slots, fewer...>(conv, f);
  f(Candidate{}, bytes);
  return true;
}

// Tiles times slots are registers, and every shape is a kernel to compile: those that the layers of SlowFast and their
// dgrads have.
template <class T, int slots, class F>
bool with_positions(const Conv& conv, const F& f) {
  const size_t bytes = size_t(conv.in) * sizeof(T);
  if constexpr (sizeof(T) == 2)
    if (bytes == 16) return with_tiles<T, 4, slots, slots == 3 ? 4 : 8>(conv, f);
  if (bytes == 32) return with_tiles<T, 2, slots, slots == 3 ? 4 : 8, 2>(conv, f);
  if (bytes % 64 != 0) return false;
  if constexpr (slots == 3) return with_tiles<T, 1, slots, 4, 2, 1>(conv, f);
  else return with_tiles<T, 1, slots, 8, 4, 2, 1>(conv, f);
}

inline int slots(const Conv& conv) { return (conv.taps - 1) / conv.stride + 1; }

template <class T, class F>
bool with_shape(const Conv& conv, const F& f) {
  switch (slots(conv)) {
    case 1: return with_positions<T, 1>(conv, f);
    case 2: return with_positions<T, 2>(conv, f);
    case 3: return with_positions<T, 3>(conv, f);
    default: return false;
  }
}

inline Conv forward_conv(const ConvForward& args) {
  const ConvShape& s = args.shape;
  Conv conv{};
  conv.rows = s.n * s.p, conv.p = s.p;
  conv.in = int(s.c), conv.out = int(s.k);
  conv.t_in = int(s.t_in), conv.t_out = int(s.t_out);
  conv.taps = conv.kt = int(s.kt), conv.stride = int(s.stride), conv.padding = int(s.padding);
  conv.step_out = 1;
  conv.x = args.x, conv.weight = args.weight;
  conv.centre = args.centre, conv.scale = args.scale, conv.shift = args.shift, conv.relu = args.relu;
  conv.residual = args.residual, conv.residual_scale = args.residual_scale;
  conv.y = args.y;
  return conv;
}

// The frames of x that are `residue` above a multiple of the stride, past the padding: with t = frame + padding, they
// are those that tap residue, residue + stride, ... of some window sees. gradient is that of the convolution's output,
// before its scale.
inline Conv dgrad_conv(const ConvBackward& args, int residue) {
  const ConvShape& s = args.shape;
  const int stride = int(s.stride), padding = int(s.padding);
  Conv conv{};
  conv.rows = s.n * s.p, conv.p = s.p;
  conv.in = int(s.k), conv.out = int(s.c);
  conv.first_out = ((residue - padding) % stride + stride) % stride, conv.step_out = stride;
  conv.t_in = int(s.t_out);
  conv.t_out = int(s.t_in) > conv.first_out ? int(ceil_div(s.t_in - conv.first_out, stride)) : 0;
  conv.kt = int(s.kt);
  // A residue that no tap has keeps one tap, of zeros: its frames are 0 and have to be written.
  conv.taps = conv.kt > residue ? int(ceil_div(conv.kt - residue, stride)) : 1;
  conv.stride = 1;
  conv.padding = conv.taps - 1 - (conv.first_out + padding - residue) / stride;
  conv.x = args.grad, conv.weight = args.weight, conv.weight_scale = args.scale;
  conv.transposed = true, conv.first_tap = residue, conv.step_tap = stride;
  conv.residual = args.dx_residual, conv.y = args.dx;
  return conv;
}

// What all three products ask of types and shapes.
template <class T>
const char* why_not_size(const ConvShape& s) {
  constexpr int64_t kMost = int64_t(1) << 30;  // leaves room for sums of two in 32 bits
  if (std::is_same_v<T, double>) return "float64 has no narrow kernels";
  if (s.dilation != 1) return "the kernel is dilated";
  if (s.c > kMostChannels || s.k > kMostChannels) return "there are more than 128 channels";
  if (s.n * s.p > kMost || s.t_in > kMost || s.kt > kMost / (s.c * s.k) || s.stride > kMost || s.padding > kMost ||
      s.t_out > kMost / s.stride)
    return "the sizes exceed 32 bits";
  return nullptr;
}

// What forward and dgrad ask.
template <class T>
const char* why_not(const ConvShape& s, bool tf32, const void* weight) {
  if (std::is_same_v<T, float> && !tf32) return "tensor cores are not as exact as this dtype";
  if (const char* reason = why_not_size<T>(s)) return reason;
  if (reinterpret_cast<uintptr_t>(weight) % sizeof(Words)) return "the weight does not start at a multiple of 16 bytes";
  return nullptr;
}

template <class T>
const char* why_not_shape(const Conv& conv) {
  if (slots(conv) > 3) return "more than three outputs share a frame";
  return with_shape<T>(conv, [](auto, size_t) {}) ? nullptr : "there is no kernel for these channels and taps";
}

// Whether the kernels here take a primitive: nullptr, or why they do not.
template <class T>
const char* why_not(const ConvForward& args) {
  const ConvShape& s = args.shape;
  if (const char* reason = why_not<T>(s, args.tf32, args.weight)) return reason;
  if (const char* reason = why_not_packs<T>(s.c, args.x)) return reason;
  if (const char* reason = why_not_packs<T>(s.k, args.residual, args.y)) return reason;
  return why_not_shape<T>(forward_conv(args));
}

// With the gradient as dgrad_conv wants it.
template <class T>
const char* why_not_dgrad(const ConvBackward& args) {
  const ConvShape& s = args.shape;
  if (const char* reason = why_not<T>(s, args.tf32, args.weight)) return reason;
  if (const char* reason = why_not_packs<T>(s.k, args.grad)) return reason;
  if (const char* reason = why_not_packs<T>(s.c, args.dx_residual, args.dx)) return reason;
  for (int residue = 0; residue < s.stride; ++residue)
    if (const char* reason = why_not_shape<T>(dgrad_conv(args, residue))) return reason;
  return nullptr;
}

template <class Shape>
Plan plan_for(const Conv& conv) {
  Plan plan{};
  plan.row_tiles = ceil_div(conv.rows, kRows * Shape::kPositions);
  plan.steps_in = int(ceil_div(conv.in, Shape::kIn));
  const int64_t least = conv.taps > conv.stride ? kLeastOutputs : 1;
  const int64_t outputs = ceil_div(conv.t_out * plan.row_tiles, kWantedItems);
  plan.outputs = int(std::min<int64_t>(std::max(outputs, least), conv.t_out));
  plan.items = plan.row_tiles * ceil_div(conv.t_out, plan.outputs);
  return plan;
}

// The kernel of a shape. The sums of a gradient are gathered behind pointwise convolutions only.
template <class Shape, class Value>
auto kernel_of(bool gathers) {
  if constexpr (std::is_same_v<Value, GradientSum<float>>) return narrow_kernel<Shape, true, Value>;
  else
    return gathers || !Shape::kApart ? narrow_kernel<Shape, true, Value> : narrow_kernel<Shape, !Shape::kApart, Value>;
}

// Launches a convolution that has outputs, and returns how many blocks there are. With `partial`, which then has room
// for kMostPartials, they leave that many values of each channel there.
template <class T, class Value, class Queue>
int64_t launch(Queue& queue, const Conv& conv, Value* partial) {
  int64_t blocks = 0;
  with_shape<T>(conv, [&](auto shape, size_t weight_bytes) {
    using Shape = decltype(shape);
    if constexpr (Shape::kSlots == 1 || !std::is_same_v<Value, GradientSum<float>>) {
      const Plan plan = plan_for<Shape>(conv);
      blocks = std::min(ceil_div(plan.items, kWarps), kMostPartials);
      const size_t bytes = kVectors * Shape::kOut * sizeof(float) + weight_bytes;
      const size_t to_merge = kWarps * Shape::kOut * sizeof(Value);
      queue.launch(kernel_of<Shape, Value>(partial),
                   {dim3(unsigned(blocks), unsigned(conv.out / Shape::kOut)), kThreads, std::max(bytes, to_merge)},
                   conv, plan, partial);
    }
  });
  return blocks;
}

template <class T, class Queue>
void forward(Queue& queue, const ConvForward& args, const BatchStats* stats) {
  const Conv conv = forward_conv(args);
  auto* partial = stats ? queue.template workspace<Moments<float>>(kMostPartials * conv.out) : nullptr;
  const int64_t chunks = rows_out(args.shape) > 0 ? launch<T, Moments<float>>(queue, conv, partial) : 0;
  if (stats) launch_merge_statistics(queue, partial, chunks, args.shape.k, rows_out(args.shape), *stats);
}

// args: the convolution alone, pointwise, whose output is not stored. Rows there are. Leaves (chunks, K) in `partial`,
// which has room for kMostPartials, and returns how many chunks there are.
template <class T, class Queue>
int64_t sum_gradient(Queue& queue, const ConvForward& args, const MaskedGradient& gradient,
                     GradientSum<float>* partial) {
  Conv conv = forward_conv(args);
  conv.gradient = gradient;
  return launch<T, GradientSum<float>>(queue, conv, partial);
}

template <class T, class Queue>
void dgrad(Queue& queue, const ConvBackward& args) {
  for (int residue = 0; residue < args.shape.stride; ++residue) {
    const Conv conv = dgrad_conv(args, residue);
    if (conv.t_out > 0) launch<T, Moments<float>>(queue, conv, nullptr);
  }
}

}  // namespace slowfast_fast::cuda::narrow
