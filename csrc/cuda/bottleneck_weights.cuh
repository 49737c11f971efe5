// The weights of bottleneck.cuh in the order of its fragments, by a launch ahead of it.
#pragma once
#include "bottleneck_plan.cuh"
#include "elementwise.cuh"
#include "pack.cuh"

namespace slowfast_fast::cuda::bottleneck {

constexpr int kQuad = 4;  // chunks of a step: those of a quad's lanes

// A weight (out, in, taps) in fragments: [group of 8 * tiles outputs][step][tile][lane] of 16 bytes.
struct Weight {
  const void* from;  // nullptr: absent
  int64_t out, in, taps;
  int tiles;
  bool by_lane;  // the depth is what a quad's lanes have of a result, else a list of chunks
  int64_t steps, fragments;
  void* to;
};
struct Weights {
  Weight of[4];  // a, b, c, shortcut
};

// Block (x, y): fragments of weight y in turn, a thread for each.
template <class T>
__global__ void __launch_bounds__(kThreads) pack_weights(Weights weights) {
  constexpr int kSize = Pack<T>::kSize;
  const Weight& w = weights.of[blockIdx.y];
  const int64_t chunks = w.in / kSize, values = w.in / kQuad;
  for (int64_t i = first_element(); i < w.fragments; i += element_step()) {
    const int column = int(i % kWarp) / kQuad, quad = int(i % kQuad), tile = int(i / kWarp % w.tiles);
    const int64_t step = i / kWarp / w.tiles % w.steps, group = i / kWarp / w.tiles / w.steps;
    const int64_t out = group * 8 * w.tiles + column / 2 * 2 * w.tiles + tile * 2 + column % 2;
    const int64_t chunk = step * kQuad + quad, tap = w.by_lane ? 0 : chunk / chunks;
    Pack<T> pack;
    for (int e = 0; e < kSize; ++e) {
      const int64_t value = step * kSize + e;
      const int64_t in = w.by_lane ? quad * values + value : chunk % chunks * kSize + e;
      const bool present = w.by_lane ? value < values : tap < w.taps;
      pack.of[e] = present ? static_cast<const T*>(w.from)[(out * w.in + in) * w.taps + tap] : T(0.f);
    }
    if constexpr (std::is_same_v<T, float>) {
      Words words;
      memcpy(words.of, pack.of, sizeof words);
      round_to_tf32(words.of);
      memcpy(pack.of, words.of, sizeof words);
    }
    pack.store(static_cast<T*>(w.to) + i * kSize);
  }
}

}  // namespace slowfast_fast::cuda::bottleneck
