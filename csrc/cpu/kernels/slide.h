// Three taps at stride 1 onto few output channels: a register tile that slides along T. A visit of an input row adds it
// to the three output frames that it belongs to, whose sums stay in registers, so that a broadcast value meets three
// vectors of weights instead of one.
#pragma once
#include "conv.h"

namespace slowfast_fast::cpu::SFF_ISA {

// Positions of a tile: three frames of sums share the registers of a plain tile.
constexpr int slide_rows = Slide32::MR / 3;

// What a tile asks for while it works: per source frame `x_bytes` from `x_ahead` bytes behind its rows, per destination
// frame `y_bytes` of the result. Hardware does not follow steps from frame to frame.
struct Ahead {
  int64_t x_ahead, x_bytes;
  const char* y;
  int64_t y_next, y_bytes;
};

SFF_INLINE void prefetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 1);
}

// out[t * next + i * panel + k] = sum over taps j and c of x[t + j][i * lda + c] * w[(j * depth + c) * panel + k] for
// `frames` destination frames, M positions and one panel. Source frames outside the clip are nullptr.
template <typename T, int M>
void slide(const typename T::A* const* x, int64_t lda, const typename T::A* w, int64_t depth, int64_t frames,
           const Ahead& ahead, typename T::A* __restrict__ out, int64_t next) {
  using V = typename T::V;
  static_assert(T::NV == 1);
  V acc[3][M];
  const auto clear = [&](int of) {
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) acc[of][i] = V{};
  };
  // Frame s of the source: tap 0 of destination s, tap 1 of s - 1 and tap 2 of s - 2, which is then complete.
  const auto step = [&](int64_t s, int first, int second, int third) __attribute__((always_inline)) {
    clear(first);
    if (x[s]) {
      const typename T::A *px = x[s], *pw = w;
      prefetch(reinterpret_cast<const char*>(px) + ahead.x_ahead, ahead.x_bytes);
      if (s < frames) prefetch(ahead.y + s * ahead.y_next, ahead.y_bytes);
      for (int64_t c = 0; c < depth; ++c, ++px, pw += T::panel) {
        const int order[3] = {first, second, third};
        V weight[3];
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) weight[j] = load_raw<V>(pw + j * depth * T::panel);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
          const typename T::A value = px[i * lda];
#pragma GCC unroll 3
          for (int j = 0; j < 3; ++j) acc[order[j]][i] += value * weight[j];
        }
      }
    }
    if (s < 2) return;
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) store_raw(out + (s - 2) * next + i * T::panel, acc[third][i]);
  };
  clear(1);
  clear(2);
  for (int64_t s = 0; s < frames + 2; s += 3) {
    step(s, 0, 2, 1);
    if (s + 1 < frames + 2) step(s + 1, 1, 0, 2);
    if (s + 2 < frames + 2) step(s + 2, 2, 1, 0);
  }
}

// The kernels for 1 ... slide_rows positions; entry [m - 1] serves m.
using Slide = void (*)(const float* const*, int64_t, const float*, int64_t, int64_t, const Ahead&, float*, int64_t);
template <int M>
struct SlideTable : SlideTable<M - 1> {
  constexpr SlideTable() { this->entry[M - 1] = slide<Slide32, M>; }
};
template <>
struct SlideTable<0> {
  Slide entry[slide_rows] = {};
};
constexpr SlideTable<slide_rows> slide_table{};

struct SlideTask : RowTask<float, Slide32> {
  float* sums;           // [panel][frame][row][channel of the panel]
  const float** source;  // [frame]

  static int64_t sums_bytes(const ConvPlan& p) {
    return align_up(p.blocking.t_block * p.blocking.p_block * p.blocking.k_group * sizeof(float));
  }
  static int64_t source_bytes(const ConvPlan& p) { return align_up((p.blocking.t_block + 2) * sizeof(const float*)); }
  static int64_t scratch(const ConvPlan& p) { return sums_bytes(p) + source_bytes(p) + statistics_bytes(p); }

  SlideTask(const ConvPlan& p, void* memory)
      : RowTask(p, static_cast<char*>(memory) + sums_bytes(p) + source_bytes(p)),
        sums(static_cast<float*>(memory)),
        source(reinterpret_cast<const float**>(static_cast<char*>(memory) + sums_bytes(p))) {}

  void run(int64_t task) {
    begin(task);
    const int64_t lda = plan.source.rows.stride_p, frames = t1 - t0, next = rows * panel;
    const int64_t tile_bytes = slide_rows * lda * int64_t(sizeof(float));
    const int64_t x_ahead = tile_bytes * ceil_div(1024, tile_bytes);  // a tile, or a KiB where tiles are short
    const Parts tiles(rows, slide_rows);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t r0 = tiles.begin(tile), m = tiles.length(tile);
      for (int64_t s = 0; s < frames + 2; ++s) {
        const int64_t f = t0 + plan.lead + s;
        source[s] = f < 0 || f >= plan.t_source ? nullptr : row_at<float>(plan.source.rows, n, f, p0 + r0);
      }
      Ahead ahead{x_ahead, tile_bytes, reinterpret_cast<const char*>(row_at<float>(plan.y, n, t0, p0 + r0)),
                  plan.y.stride_t * int64_t(sizeof(float)), m * plan.y.stride_p * int64_t(sizeof(float))};
      for (int64_t i = 0; i < panels; ++i) {
        float* out = sums + (i * frames * rows + r0) * panel;
        slide_table.entry[m - 1](source, lda, weights(i, 0, 3), plan.c, frames, ahead, out, next);
        ahead.x_bytes = ahead.y_bytes = 0;
      }
    }
    for (int64_t t = t0; t < t1; ++t)
      for (int64_t i = 0; i < panels; ++i) finish(sums + (i * frames + t - t0) * next, i, t, 0, rows);
    end();
  }
};

}  // namespace slowfast_fast::cpu::SFF_ISA
