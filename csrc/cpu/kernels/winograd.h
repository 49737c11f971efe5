// Three taps at stride 1 by Winograd's minimal filtering F(2, 3) along T (Winograd 1980; Lavin & Gray, CVPR 2016): two output frames
// from four input frames with four products instead of six.
//
//   V0 = d0 - d2    U0 = g0                    y0 = M0 + M1 + M2        Mi = sum over c of Vi * Ui
//   V1 = d1 + d2    U1 = (g0 + g1 + g2) / 2    y1 = M1 - M2 - M3
//   V2 = d2 - d1    U2 = (g0 - g1 + g2) / 2
//   V3 = d1 - d3    U3 = g2
//
// The transforms are additions and a division by two; the sums have a third of the direct length. Against float64 the error stays below that
// of the direct sum in one accumulator.
#pragma once
#include "conv.h"

namespace slowfast_fast::cpu::SFF_ISA {

// V0 ... V3 of every pair of destination frames from t0 on, for one row: to[pair * 4 * next + v * next + c]. Frames outside the clip are 0.
// `buffer` holds 2 * pairs + 2 frames of `ld` values, for those that cannot be read in place.
template <typename T, int W>
void transform_source(const Source& source, int64_t n, int64_t p, int64_t first_frame, int64_t t_source, int64_t pairs, int64_t c0,
                      int64_t depth, int64_t ld, Acc<T>* buffer, Acc<T>* to, int64_t next) {
  using A = Acc<T>;
  using V = Vec<A, W>;
  const auto frame = [&](int64_t i) -> const A* {
    const int64_t f = first_frame + i;
    const bool inside = f >= 0 && f < t_source;
    if (inside && is_direct<T>(source)) return reinterpret_cast<const A*>(row_at<T>(source.rows, n, f, p)) + c0;
    A* row = buffer + i * ld;
    if (inside) read_rows<T, W>(source, n, f, p, 1, c0, depth, row, ld);
    else
      for (int64_t c = 0; c < depth; ++c) row[c] = 0;
    return row;
  };
  const A *f0 = frame(0), *f1 = frame(1);
  for (int64_t pair = 0; pair < pairs; ++pair, to += 4 * next) {
    const A *f2 = frame(2 * pair + 2), *f3 = frame(2 * pair + 3);
    for (int64_t c = 0; c < depth; c += W) {
      const int64_t count = depth - c;
      const V d0 = load<W>(f0 + c, count), d1 = load<W>(f1 + c, count), d2 = load<W>(f2 + c, count), d3 = load<W>(f3 + c, count);
      store<W>(to + c, d0 - d2, count);
      store<W>(to + next + c, d1 + d2, count);
      store<W>(to + 2 * next + c, d2 - d1, count);
      store<W>(to + 3 * next + c, d1 - d3, count);
    }
    f0 = f2;
    f1 = f3;
  }
}

template <typename T, typename Tl>
struct WinogradTask : RowTask<T, Tl> {
  using Base = RowTask<T, Tl>;
  using A = typename Base::A;
  using V = typename Base::V;
  using Base::plan, Base::b, Base::rows, Base::p0, Base::t0, Base::t1, Base::n, Base::panels, Base::panel, Base::W;

  A* sums;         // [panel of the group][pair][row tile][M0 ... M3][row][panel], or one tile's when the depth is one block
  A* transformed;  // [pair][V0 ... V3][row][c_block]
  A* read;         // [frame][c_block]: one row of the frames that products cannot read in place

  static int64_t sums_bytes(const ConvPlan& p) {
    const Blocking& b = p.blocking;
    const int64_t pairs = ceil_div(b.t_block, 2);
    return align_up((p.c > b.c_block ? b.k_group * pairs * b.p_block : panel * Tl::MR) * 4 * sizeof(A));
  }
  static int64_t transformed_bytes(const ConvPlan& p) {
    return align_up(ceil_div(p.blocking.t_block, 2) * 4 * p.blocking.p_block * p.blocking.c_block * sizeof(A));
  }
  static int64_t read_bytes(const ConvPlan& p) { return align_up((p.blocking.t_block + 3) * p.blocking.c_block * sizeof(A)); }
  static int64_t scratch(const ConvPlan& p) {
    return sums_bytes(p) + transformed_bytes(p) + read_bytes(p) + Base::statistics_bytes(p);
  }

  WinogradTask(const ConvPlan& p, void* memory)
      : Base(p, static_cast<char*>(memory) + sums_bytes(p) + transformed_bytes(p) + read_bytes(p)), sums(static_cast<A*>(memory)),
        transformed(reinterpret_cast<A*>(static_cast<char*>(memory) + sums_bytes(p))),
        read(reinterpret_cast<A*>(static_cast<char*>(memory) + sums_bytes(p) + transformed_bytes(p))) {}

  void run(int64_t task) {
    this->begin(task);
    const int64_t pairs = ceil_div(t1 - t0, 2);
    for (int64_t c0 = 0; c0 < plan.c; c0 += b.c_block) {
      const int64_t depth = plan.c - c0 < b.c_block ? plan.c - c0 : b.c_block;
      for (int64_t r = 0; r < rows; ++r)
        transform_source<T, W>(plan.source, n, p0 + r, t0 + plan.lead, plan.t_source, pairs, c0, depth, b.c_block, read,
                               transformed + r * b.c_block, rows * b.c_block);
      for (int64_t i = 0; i < panels; ++i)
        for (int64_t pair = 0; pair < pairs; ++pair) products(i, pair, c0, depth);
    }
    this->end();
  }

  // One panel of two frames, for one block of the depth.
  void products(int64_t i, int64_t pair, int64_t c0, int64_t depth) {
    const A* weight = this->weights(i, c0, 4);
    const Parts tiles(rows, Tl::MR);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t r0 = tiles.begin(tile), m = tiles.length(tile);
      A* out = plan.c > b.c_block ? sums + ((i * ceil_div(b.t_block, 2) + pair) * b.p_block + r0) * 4 * panel : sums;
      for (int v = 0; v < 4; ++v) {
        const A* pa = transformed + ((pair * 4 + v) * rows + r0) * b.c_block;
        const A* pb = weight + v * depth * panel;
        table<Tl>.products[m - 1](1, &pa, &pb, b.c_block, depth, out + v * m * panel, c0 > 0);
      }
      if (c0 + depth < plan.c) continue;
      const int64_t size = m * panel, t = t0 + 2 * pair;
      for (int64_t e = 0; e < size; e += W) {
        const V m0 = load<W>(out + e), m1 = load<W>(out + size + e), m2 = load<W>(out + 2 * size + e), m3 = load<W>(out + 3 * size + e);
        store<W>(out + e, m0 + m1 + m2);
        store<W>(out + size + e, m1 - m2 - m3);
      }
      this->finish(out, i, t, r0, m);
      if (t + 1 < t1) this->finish(out + size, i, t + 1, r0, m);
    }
  }
};

}  // namespace slowfast_fast::cpu::SFF_ISA
