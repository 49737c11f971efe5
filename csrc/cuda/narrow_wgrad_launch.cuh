// Which wgrads the narrow kernel takes, and its launch.
#pragma once
#include "narrow_launch.cuh"
#include "narrow_wgrad.cuh"

namespace slowfast_fast::cuda::narrow {

constexpr int64_t kMostWgradSlices = 2;  // from there on, tiles read no more
// Of a block's step: two steps of one or two blocks on an SM are then the bytes that its share of HBM has on their way.
constexpr int64_t kStepBytes = 12 << 10;
constexpr int64_t kMostPositions = 256;
// Blocks in all: two on each SM of an H100 or H200; one where the partial results would be much of what is moved. Not
// asked of the device, so that sums are the same everywhere.
constexpr int64_t kWgradBlocks = 264, kFewWgradBlocks = 132, kManyValues = 4096;
// Rows of a block: fewer do not pay for its partial result, more let the rounding errors of a long sum grow.
constexpr int64_t kLeastBlockRows = 512, kMostBlockRows = 1 << 15;

inline int power_of_two_from(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Calls f(WgradShape): few sums for each warp where they suffice, else as many as registers hold; FmaOctets holds two
// of each.
template <class T, class F>
void with_wgrad_shape(const ConvShape& s, bool tf32, const F& f) {
  const bool few_in = s.kt * s.c <= 8 * kOctet, few_out = s.k <= 2 * kOctet;
  if constexpr (std::is_same_v<T, float>) {
    if (!tf32) return few_in ? f(WgradShape<FmaOctets, 2, 2>{}) : f(WgradShape<FmaOctets, 6, 2>{});
  }
  using Math = TensorOctets<T>;
  if (few_in && few_out) return f(WgradShape<Math, 2, 2>{});
  if (few_in) return f(WgradShape<Math, 2, 4>{});
  if (few_out) return f(WgradShape<Math, 6, 2>{});
  f(WgradShape<Math, 6, 4>{});
}

// forms: whether the gradient is formed of two tensors. Without slices where the shape does not suit.
template <class Shape>
WgradPlan wgrad_plan(const ConvShape& s, bool forms) {
  using T = typename Shape::T;
  WgradPlan plan{};
  const int64_t octets_in = s.kt * s.c / kOctet, octets = s.k / kOctet;
  const int pair_warps = power_of_two_from(ceil_div(octets_in, 2 * Shape::kPairs));
  if (pair_warps > kWgradWarps) return plan;
  plan.pair_warps = pair_warps;
  plan.octet_warps = std::min(power_of_two_from(ceil_div(octets, Shape::kOctets)), kWgradWarps / pair_warps);
  plan.slices = int(ceil_div(octets, plan.octet_warps * Shape::kOctets));
  if (octets % plan.slices != 0 || plan.slices > kMostWgradSlices) return {};
  plan.slice_octets = int(octets / plan.slices);
  plan.forms = forms;

  plan.span = int(std::min(s.kt, s.stride));
  // The window of a step and what the steps ahead of it add, one of which may begin with a window of its own; or all of
  // them, in the shortest clips.
  plan.ring = int(s.kt + kAheadSteps * plan.span + (s.kt - plan.span) * (s.t_out < kAheadSteps ? kAheadSteps : 1));
  const int unit = kPositionsAtOnce<T> * kWgradWarps / (plan.pair_warps * plan.octet_warps);
  const int64_t bytes = (plan.span * s.c + (1 + forms) * plan.slice_octets * kOctet) * int64_t(sizeof(T));
  const int64_t most = std::min(kMostPositions / unit, ceil_div(s.n * s.p, unit));
  plan.positions = int(std::clamp<int64_t>(kStepBytes / bytes / unit, 1, most)) * unit;

  const int64_t steps = ceil_div(s.n * s.p, plan.positions) * s.t_out;
  const int64_t blocks = s.kt * s.c * s.k > kManyValues ? kFewWgradBlocks : kWgradBlocks;
  plan.steps = cut(steps, ceil_div(kLeastBlockRows, plan.positions),
                   std::max(blocks / plan.slices, ceil_div(rows_out(s), kMostBlockRows)));
  return plan;
}

template <class Shape>
size_t wgrad_shared_bytes(const ConvShape& s, const WgradPlan& plan) {
  using Memory = WgradMemory<typename Shape::T>;
  const int sharing = kWgradWarps - plan.pair_warps * plan.octet_warps;  // that leave their sums to others
  return std::max(
      Memory::table_bytes(plan) + Memory::gradients_bytes(plan) + Memory::ring_bytes(plan, int(s.c) / kOctet),
      sharing * Shape::kValues * int(kWarp * sizeof(float)));
}

// Whether the kernel forms the gradient of the convolution's output itself.
inline bool forms_gradient(const ConvBackward& args) { return gradient_changes(args) && !residual_masks(args); }

// Whether the kernel takes a wgrad: nullptr, or why it does not.
template <class T>
const char* why_not_wgrad(const ConvBackward& args) {
  const ConvShape& s = args.shape;
  if (const char* reason = why_not_size<T>(s)) return reason;
  if (s.c % kOctet || s.k % kOctet) return "C or K is no multiple of 8";
  if (const char* reason = why_not_packs<T>(s.k, args.grad, args.y, args.bn.raw, args.dconv)) return reason;
  if (const char* reason = why_not_packs<T>(s.c, args.x)) return reason;
  const char* reason = nullptr;
  with_wgrad_shape<T>(s, args.tf32, [&](auto shape) {
    using Shape = decltype(shape);
    const WgradPlan plan = wgrad_plan<Shape>(s, true);
    if (!plan.slices) reason = "a block's registers do not hold the weight's gradient";
    else if (wgrad_shared_bytes<Shape>(s, plan) > kMostSharedBytes)
      reason = "the frames under a window do not fit shared memory";
  });
  return reason;
}

// What a launch left of the weight's gradient: (chunks, K, kt, C).
struct PartialWgrad {
  float* of;
  int64_t chunks;
};

// args may have ReLU and BatchNorm before them where forms_gradient says so. gradient: see narrow_wgrad_kernel.
template <class T, class Queue>
PartialWgrad launch_wgrad(Queue& queue, const ConvBackward& args, const float* sum, const float* sum_xhat,
                          const OutRows& gradient) {
  const ConvShape& s = args.shape;
  PartialWgrad partial{};
  with_wgrad_shape<T>(s, args.tf32, [&](auto shape) {
    using Shape = decltype(shape);
    const WgradPlan plan = wgrad_plan<Shape>(s, forms_gradient(args));
    partial = {queue.template workspace<float>(plan.steps.count * s.k * s.kt * s.c), plan.steps.count};
    queue.launch(narrow_wgrad_kernel<Shape>,
                 {dim3(unsigned(plan.steps.count * plan.slices)), kWgradThreads, wgrad_shared_bytes<Shape>(s, plan)},
                 args, sum, sum_xhat, gradient, plan, partial.of);
  });
  return partial;
}

}  // namespace slowfast_fast::cuda::narrow
