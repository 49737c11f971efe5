// Three taps at stride 1 by Winograd's minimal filtering F(2, 3) along T (Winograd 1980; Lavin & Gray, CVPR 2016): two
// output frames from four input frames with four products instead of six.
//
//   V0 = d0 - d2    U0 = g0                    y0 = M0 + M1 + M2        Mi = sum over c of Vi * Ui
//   V1 = d1 + d2    U1 = (g0 + g1 + g2) / 2    y1 = M1 - M2 - M3
//   V2 = d2 - d1    U2 = (g0 - g1 + g2) / 2
//   V3 = d1 - d3    U3 = g2
//
// The transforms are additions and a division by two; the sums have a third of the direct length. Against float64 the
// error stays below that of the direct sum in one accumulator.
#pragma once
#include "conv.h"

namespace slowfast_fast::cpu::SFF_ISA {

// V0 ... V3 of every pair of destination frames from t0 on, for one row: to[pair * 4 * next + v * next + c]. Frames
// outside the clip are 0. `buffer` holds 2 * pairs + 2 frames of `ld` values, for those that cannot be read in place.
template <typename T, int W>
void transform_source(const Source& source, int64_t n, int64_t p, int64_t first_frame, int64_t t_source, int64_t pairs,
                      int64_t c0, int64_t depth, int64_t ld, Acc<T>* buffer, Acc<T>* to, int64_t next) {
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
      const V d0 = load<W>(f0 + c, count), d1 = load<W>(f1 + c, count), d2 = load<W>(f2 + c, count),
              d3 = load<W>(f3 + c, count);
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

  A* sums;         // [panel of the group, or one when the depth is one block][M0 ... M3][pair][row][panel]
  A* transformed;  // [pair][V0 ... V3][row][c_block]
  A* read;         // [frame][c_block]: one row of the frames that products cannot read in place

  static int64_t sums_bytes(const ConvPlan& p) {
    const Blocking& b = p.blocking;
    const int64_t pairs = ceil_div(b.t_block, 2);
    return align_up((p.c > b.c_block ? b.k_group : panel) * pairs * b.p_block * 4 * sizeof(A));
  }
  static int64_t transformed_bytes(const ConvPlan& p) {
    return align_up(ceil_div(p.blocking.t_block, 2) * 4 * p.blocking.p_block * p.blocking.c_block * sizeof(A));
  }
  static int64_t read_bytes(const ConvPlan& p) {
    return align_up((p.blocking.t_block + 3) * p.blocking.c_block * sizeof(A));
  }
  static int64_t scratch(const ConvPlan& p) {
    return sums_bytes(p) + transformed_bytes(p) + read_bytes(p) + Base::statistics_bytes(p);
  }

  WinogradTask(const ConvPlan& p, void* memory)
      : Base(p, static_cast<char*>(memory) + sums_bytes(p) + transformed_bytes(p) + read_bytes(p)),
        sums(static_cast<A*>(memory)),
        transformed(reinterpret_cast<A*>(static_cast<char*>(memory) + sums_bytes(p))),
        read(reinterpret_cast<A*>(static_cast<char*>(memory) + sums_bytes(p) + transformed_bytes(p))) {}

  void run(int64_t task) {
    this->begin(task);
    const int64_t pairs = ceil_div(t1 - t0, 2);
    for (int64_t c0 = 0; c0 < plan.c; c0 += b.c_block) {
      const int64_t depth = plan.c - c0 < b.c_block ? plan.c - c0 : b.c_block;
      for (int64_t r = 0; r < rows; ++r) {
        if (r + 2 < rows) prefetch(p0 + r + 2, pairs, c0, depth);
        transform_source<T, W>(plan.source, n, p0 + r, t0 + plan.lead, plan.t_source, pairs, c0, depth, b.c_block, read,
                               transformed + r * b.c_block, rows * b.c_block);
      }
      for (int64_t i = 0; i < panels; ++i) products(i, pairs, c0, depth);
    }
    this->end();
  }

  // One row of the source frames. Rows of wide layers lie a page apart, where hardware does not follow.
  void prefetch(int64_t p, int64_t pairs, int64_t c0, int64_t depth) const {
    for (int64_t f = t0 + plan.lead; f < t0 + plan.lead + 2 * pairs + 2; ++f) {
      if (f < 0 || f >= plan.t_source) continue;
      const T* row = row_at<T>(plan.source.rows, n, f, p) + c0;
      for (int64_t c = 0; c < depth; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + c);
    }
  }

  // Mv of row r0 and those after it.
  A* tile_sums(int64_t i, int64_t v, int64_t pair, int64_t r0) const {
    const int64_t slot = plan.c > b.c_block ? i : 0;
    return sums + (((slot * 4 + v) * ceil_div(b.t_block, 2) + pair) * b.p_block + r0) * panel;
  }

  // One panel of all rows of the task, for one block of the depth. A matrix stays in L1 while the row tiles stream past
  // it; where all four do, each tile is finished at once.
  void products(int64_t i, int64_t pairs, int64_t c0, int64_t depth) {
    const Parts tiles(rows, Tl::MR);
    const int64_t count = pairs * tiles.count, visit = 4 * depth * panel * int64_t(sizeof(A)) <= l1_weights ? 1 : count;
    for (int64_t first = 0; first < count; first += visit) {
      for (int v = 0; v < 4; ++v) {
        const A* pb = this->weights(i, c0, 4) + v * depth * panel;
        const A* next = v < 3 ? pb + depth * panel : after(i, c0, depth);
        for (int64_t j = first; j < first + visit; ++j) {
          const int64_t pair = j / tiles.count, r0 = tiles.begin(j % tiles.count), m = tiles.length(j % tiles.count);
          const A* pa = transformed + ((pair * 4 + v) * rows + r0) * b.c_block;
          // The next matrix comes from L3 or memory: every product asks for its share.
          const int64_t share = depth * panel * (j + 1) / count;
          for (int64_t e = depth * panel * j / count; e < share; e += 64 / int64_t(sizeof(A)))
            __builtin_prefetch(next + e);
          table<Tl>.products[m - 1](1, &pa, &pb, b.c_block, depth, tile_sums(i, v, pair, r0), c0 > 0);
        }
      }
      if (c0 + depth < plan.c) continue;
      for (int64_t j = first; j < first + visit; ++j)
        write(i, j / tiles.count, tiles.begin(j % tiles.count), tiles.length(j % tiles.count));
    }
  }

  // The weights that are read after those of panel i.
  const A* after(int64_t i, int64_t c0, int64_t depth) const {
    if (i + 1 < panels) return this->weights(i + 1, c0, 4);
    return this->weights(0, c0 + depth < plan.c ? c0 + depth : 0, 4);
  }

  // Two frames of one tile.
  void write(int64_t i, int64_t pair, int64_t r0, int64_t m) {
    const int64_t t = t0 + 2 * pair;
    A* y[4];  // M0 ... M3; the first two become the outputs
    for (int v = 0; v < 4; ++v) y[v] = tile_sums(i, v, pair, r0);
    for (int64_t e = 0; e < m * panel; e += W) {
      const V m0 = load<W>(y[0] + e), m1 = load<W>(y[1] + e), m2 = load<W>(y[2] + e), m3 = load<W>(y[3] + e);
      store<W>(y[0] + e, m0 + m1 + m2);
      store<W>(y[1] + e, m1 - m2 - m3);
    }
    this->finish(y[0], i, t, r0, m);
    if (t + 1 < t1) this->finish(y[1], i, t + 1, r0, m);
  }
};

}  // namespace slowfast_fast::cpu::SFF_ISA
