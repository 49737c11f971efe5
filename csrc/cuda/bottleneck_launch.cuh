// Which kernel takes a bottleneck block, and its launches.
#pragma once
#include <torch/headeronly/util/Exception.h>

#include "bottleneck.cuh"
#include "bottleneck_general.cuh"

namespace slowfast_fast::cuda::bottleneck {

constexpr int64_t kMost = int64_t(1) << 30;  // leaves room for sums of two in 32 bits

// Calls f(Shape) with that of j inner channels, and says whether there is one.
template <class T, class F>
bool with_shape(int64_t j, const F& f) {
  switch (j) {
    case 8: return f(Shape<T, 8>{}), true;
    case 16: return f(Shape<T, 16>{}), true;
    case 32: return f(Shape<T, 32>{}), true;
    case 64: return f(Shape<T, 64>{}), true;
    default: return false;
  }
}

// Why the kernel on tensor cores does not take a block; nullptr if it does.
template <class T>
const char* why_not(const Bottleneck& s) {
  if constexpr (std::is_same_v<T, double>) {
    return "tensor cores are not as exact as this dtype";
  } else {
    if (std::is_same_v<T, float> && !s.tf32) return "tensor cores are not as exact as this dtype";
    if (!with_shape<T>(s.j, [](auto) {}))
      return "there is no kernel for these inner channels, only for 8, 16, 32 and 64";
    if (s.k % kOut != 0) return "the output channels are no multiple of 32";
    if (s.k > kMostOut) return "there are more than 4096 output channels";
    if (const char* reason = why_not_packs<T>(s.c, s.x)) return reason;
    if (const char* reason = why_not_packs<T>(s.k, s.y)) return reason;
    return nullptr;
  }
}

template <class T>
Weight weight_of(const void* from, int64_t out, int64_t in, int64_t taps, int tiles, bool by_lane = false) {
  constexpr int64_t kSize = Pack<T>::kSize;
  Weight w{from, out, in, taps, tiles, by_lane, 0, 0, nullptr};
  w.steps = by_lane ? ceil_div(in / kQuad, kSize) : ceil_div(in / kSize * taps, kQuad);
  w.fragments = from ? out / 8 * w.steps * kWarp : 0;
  return w;
}

template <class T, class Queue>
Weights packed(Queue& queue, const Bottleneck& s) {
  const int tiles = int(s.j / 8);
  Weights weights{{weight_of<T>(s.weight_a, s.j, s.c, s.kt, tiles), weight_of<T>(s.weight_b, s.j, s.j, 9, tiles),
                   weight_of<T>(s.weight_c, s.k, s.j, 1, kOutTiles, true),
                   weight_of<T>(s.weight_shortcut, s.k, s.c, 1, kOutTiles)}};
  int64_t all = 0, most = 0;
  for (const Weight& w : weights.of) all += w.fragments, most = std::max(most, w.fragments);
  auto* to = queue.template workspace<Words>(all);
  for (Weight& w : weights.of) w.to = to, to += w.fragments;
  queue.launch(pack_weights<T>, {dim3(unsigned(std::min(ceil_div(most, kThreads), kMostBlocks)), 4), kThreads, 0},
               weights);
  return weights;
}

inline unsigned grid(const Plan& plan) {
  const Bottleneck& s = plan.block;
  STD_TORCH_CHECK(plan.items <= 0x7FFFFFFF && std::max({s.t, s.h, s.w, s.c * s.kt, 9 * s.j * s.j, s.k << 15}) <= kMost,
                  "bottleneck: the sizes exceed 32 bits");
  return unsigned(plan.items);
}

template <class T, class Queue>
void launch(Queue& queue, const Bottleneck& s) {
  if constexpr (!std::is_same_v<T, double>)
    if (!why_not<T>(s)) {
      const Weights weights = packed<T>(queue, s);
      with_shape<T>(s.j, [&](auto shape) {
        using Shape = decltype(shape);
        const Plan plan = choose_plan(s, sizeof(T), kMostBandBytes, queue.items(kWantedItems), shared_bytes<Shape>);
        queue.launch(bottleneck_kernel<Shape>, {dim3(grid(plan)), kThreads, shared_bytes<Shape>(plan)}, plan, weights);
      });
      return;
    }
  using Acc = Accumulator<T>;
  const Plan plan = choose_plan(s, sizeof(T), kMostSharedBytes, queue.items(kWantedItems), general_bytes<Acc>);
  queue.launch(bottleneck_general_kernel<T>, {dim3(grid(plan)), kThreads, general_bytes<Acc>(plan)}, plan);
}

template <class Queue>
void run(Queue& queue, const Bottleneck& args) {
  if (args.n > 0) with_type(args.dtype, [&](auto type) { launch<typename decltype(type)::type>(queue, args); });
}

// Why a dense block whose tensors lie at multiples of 16 bytes, or do not, takes the general kernel; "" if it does not.
inline const char* explain(int64_t c, int64_t j, int64_t k, Dtype dtype, bool tf32, bool aligned) {
  const auto begin = reinterpret_cast<void*>(uintptr_t(aligned ? sizeof(Words) : 1));
  Bottleneck s{};
  s.c = c, s.j = j, s.k = k;
  s.tf32 = tf32;
  s.x = {begin, c, c, c};
  s.y = {begin, k, k, k};
  const char* reason = nullptr;
  with_type(dtype, [&](auto type) { reason = why_not<typename decltype(type)::type>(s); });
  return reason ? reason : "";
}

}  // namespace slowfast_fast::cuda::bottleneck
