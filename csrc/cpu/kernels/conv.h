// The convolution as products of row tiles and packed weights: forward (with epilogue or statistics) and dgrad.
#pragma once
#include "micro.h"
#include "source.h"

namespace slowfast_fast::cpu::SFF_ISA {

constexpr int64_t align_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Running statistics of one panel within a task: sums of (v - pivot) and its square in double, the pivot being the mean
// of the first tile. The pivot is close to the mean, so nothing cancels, however large the mean is against the
// deviation.
template <typename Tl>
struct PanelStatistics {
  typename Tl::A pivot[Tl::panel];
  double sum[Tl::panel], square[Tl::panel];
  int64_t count;
};

// What every product does with its task: which rows and channels it covers, and what happens to its finished tiles.
template <typename T, typename Tl>
struct RowTask {
  using A = Acc<T>;
  using V = typename Tl::V;
  static constexpr int W = Tl::W, panel = Tl::panel;

  const ConvPlan& plan;
  const Blocking& b;
  PanelStatistics<Tl>* statistics;  // [panel of the group]
  int64_t n, p0, rows, t0, t1, k0, panels, row_task;

  static int64_t statistics_bytes(const ConvPlan& p) {
    return p.statistics ? align_up(p.blocking.k_group / panel * sizeof(PanelStatistics<Tl>)) : 0;
  }

  RowTask(const ConvPlan& p, char* memory)
      : plan(p), b(p.blocking), statistics(reinterpret_cast<PanelStatistics<Tl>*>(memory)) {}

  void begin(int64_t task) {
    const int64_t groups = ceil_div(plan.k, b.k_group), p_blocks = ceil_div(plan.p, b.p_block),
                  t_blocks = ceil_div(plan.t, b.t_block);
    const int64_t group = task % groups;
    row_task = task / groups;
    t0 = row_task % t_blocks * b.t_block;
    t1 = t0 + b.t_block < plan.t ? t0 + b.t_block : plan.t;
    const Parts parts(plan.p, b.p_block);
    const int64_t block = row_task / t_blocks % p_blocks;
    n = row_task / t_blocks / p_blocks;
    p0 = parts.begin(block);
    rows = parts.length(block);
    k0 = group * b.k_group;
    const int64_t k1 = k0 + b.k_group < plan.k ? k0 + b.k_group : plan.k;
    panels = ceil_div(k1 - k0, panel);
    if (plan.statistics)
      for (int64_t i = 0; i < panels; ++i) statistics[i].count = 0;
  }

  void end() {
    if (plan.statistics)
      for (int64_t i = 0; i < panels; ++i) write_statistics(statistics[i], k0 + i * panel);
  }

  // The packed weights of panel i of the group for depth c0 onwards; `taps` matrices a panel.
  const A* weights(int64_t i, int64_t c0, int64_t taps) const {
    return static_cast<const A*>(plan.weight) + ((k0 / panel + i) * plan.c + c0) * taps * panel;
  }

  // m finished rows of panel i, positions p0 + r0 onwards of frame t.
  void finish(const A* tile, int64_t i, int64_t t, int64_t r0, int64_t m) {
    epilogue(tile, k0 + i * panel, t, p0 + r0, m);
    if (plan.statistics) gather(tile, m, statistics + i);
  }

  void epilogue(const A* tile, int64_t first, int64_t t, int64_t p, int64_t m) {
    const int64_t channels = plan.k - first < panel ? plan.k - first : panel;
    for (int64_t c = 0; c < channels; c += W) {
      if (channels - c >= W) epilogue(tile + c, first + c, t, p, m, W);
      else epilogue(tile + c, first + c, t, p, m, channels - c);
    }
  }

  // One vector of channels, `count` of which exist: a constant W compiles to whole loads and stores.
  SFF_INLINE void epilogue(const A* tile, int64_t k, int64_t t, int64_t p, int64_t m, int64_t count) {
    // Copies: to the compiler a store could change the plan.
    const bool affine = plan.scale, activated = plan.relu;
    const int64_t y_next = plan.y.stride_p, residual_next = plan.residual.stride_p;
    const V scale = affine ? load<W>(static_cast<const A*>(plan.scale) + k) : V{};
    const V shift = affine ? load<W>(static_cast<const A*>(plan.shift) + k) : V{};
    T* y = row_at<T>(plan.y, n, t, p) + k;
    const T* residual = row_at<T>(plan.residual, n, t, p);
    for (int64_t i = 0; i < m; ++i, y += y_next) {
      V v = load<W>(tile + i * panel);
      if (affine) v = v * scale + shift;
      if (residual) v += load<W>(residual + i * residual_next + k, count);
      if (activated) v = relu(v);
      store<W>(y, v, count);
    }
  }

  void gather(const A* tile, int64_t m, PanelStatistics<Tl>* stats) {
    for (int c = 0; c < panel; c += W) {
      V pivot = load<W>(stats->pivot + c), sum{}, square{};
      if (stats->count == 0) {
        V total{};
        for (int64_t i = 0; i < m; ++i) total += stored<T, W>(load<W>(tile + i * panel + c));
        pivot = total / A(m);
        store<W>(stats->pivot + c, pivot);
        for (int l = 0; l < W; ++l) stats->sum[c + l] = stats->square[c + l] = 0;
      }
      for (int64_t i = 0; i < m; ++i) {
        const V d = stored<T, W>(load<W>(tile + i * panel + c)) - pivot;
        sum += d;
        square += d * d;
      }
      for (int l = 0; l < W; ++l) {
        stats->sum[c + l] += sum[l];
        stats->square[c + l] += square[l];
      }
    }
    stats->count += m;
  }

  void write_statistics(const PanelStatistics<Tl>& stats, int64_t first) {
    double* mean = plan.statistics + row_task * 2 * plan.k;
    double* m2 = mean + plan.k;
    const double count = double(stats.count);
    for (int l = 0; l < panel && first + l < plan.k; ++l) {
      mean[first + l] = stats.pivot[l] + stats.sum[l] / count;
      const double spread = stats.square[l] - stats.sum[l] * stats.sum[l] / count;
      m2[first + l] = spread < 0 ? 0 : spread;
    }
  }
};

// The convolution as it is written: a product for every tap.
template <typename T, typename Tl>
struct ConvTask : RowTask<T, Tl> {
  using Base = RowTask<T, Tl>;
  using A = typename Base::A;
  using Base::plan, Base::b, Base::rows, Base::p0, Base::t0, Base::t1, Base::n, Base::panels, Base::panel;

  A* sums;    // [panel of the group][frame][row][panel], or one tile when the depth is one block
  A* source;  // [frame][row][c_block], unless products read the tensor itself

  static int64_t sums_bytes(const ConvPlan& p) {
    const Blocking& b = p.blocking;
    return align_up((p.c > b.c_block ? b.k_group * b.t_block * b.p_block : panel * Tl::MR) * sizeof(A));
  }
  static bool in_place(const ConvPlan& p) { return is_direct<T>(p.source) && !p.gather; }
  static int64_t source_bytes(const ConvPlan& p) {
    if (in_place(p)) return 0;
    int64_t frames = 0;
    for (int64_t t = 0; t < p.t; t += p.blocking.t_block) {
      int64_t from, to;
      source_range(p.taps, p.t_source, t, t + p.blocking.t_block < p.t ? t + p.blocking.t_block : p.t, &from, &to);
      if (to - from > frames) frames = to - from;
    }
    return align_up(frames * p.blocking.p_block * p.blocking.c_block * sizeof(A));
  }
  static int64_t scratch(const ConvPlan& p) { return sums_bytes(p) + source_bytes(p) + Base::statistics_bytes(p); }

  ConvTask(const ConvPlan& p, void* memory)
      : Base(p, static_cast<char*>(memory) + sums_bytes(p) + source_bytes(p)),
        sums(static_cast<A*>(memory)),
        source(reinterpret_cast<A*>(static_cast<char*>(memory) + sums_bytes(p))) {}

  void run(int64_t task) {
    this->begin(task);
    int64_t from, to;
    source_range(plan.taps, plan.t_source, t0, t1, &from, &to);
    for (int64_t c0 = 0; c0 < plan.c; c0 += b.c_block) {
      const int64_t depth = plan.c - c0 < b.c_block ? plan.c - c0 : b.c_block;
      if (!in_place(plan))
        for (int64_t f = from; f < to; ++f)
          read_rows<T, Tl::W>(plan.source, n, f, p0, rows, c0, depth, source + (f - from) * rows * b.c_block,
                              b.c_block);
      for (int64_t i = 0; i < panels; ++i)
        for (int64_t t = t0; t < t1; ++t) products(i, t, from, c0, depth);
    }
    this->end();
  }

  // One panel of one frame, for one block of the depth.
  void products(int64_t i, int64_t t, int64_t from, int64_t c0, int64_t depth) {
    const bool direct = in_place(plan);
    const int64_t lda = direct ? plan.source.rows.stride_p : b.c_block;
    const A* weight = this->weights(i, c0, plan.kt);
    const Parts tiles(rows, Tl::MR);
    const int64_t end = plan.taps.first[t + 1];
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t r0 = tiles.begin(tile), m = tiles.length(tile);
      A* out = plan.c > b.c_block ? sums + ((i * b.t_block + t - t0) * b.p_block + r0) * panel : sums;
      bool accumulate = c0 > 0;
      int64_t e = plan.taps.first[t];
      do {
        const A *pa[max_taps], *pb[max_taps];
        int taps = 0;
        for (; e < end && taps < max_taps; ++e, ++taps) {
          const int64_t frame = plan.taps.frame[e];
          pa[taps] = direct ? reinterpret_cast<const A*>(row_at<T>(plan.source.rows, n, frame, p0 + r0)) + c0
                            : source + ((frame - from) * rows + r0) * b.c_block;
          pb[taps] = weight + plan.taps.tap[e] * depth * panel;
        }
        table<Tl>.products[m - 1](taps, pa, pb, lda, depth, out, accumulate);
        accumulate = true;
      } while (e < end);
      if (direct && i == 0 && t + 1 < t1) prefetch(plan.taps.first[t + 2] - 1, r0, m, c0, depth);
      if (c0 + depth == plan.c) this->finish(out, i, t, r0, m);
    }
  }

  // The rows that the next frame's tile will read first. Hardware follows a frame's rows but not the step from frame to
  // frame.
  void prefetch(int64_t entry, int64_t r0, int64_t m, int64_t c0, int64_t depth) const {
    if (entry < 0) return;
    const T* row = row_at<T>(plan.source.rows, n, plan.taps.frame[entry], p0 + r0) + c0;
    for (int64_t i = 0; i < m; ++i, row += plan.source.rows.stride_p)
      for (int64_t c = 0; c < depth; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + c);
  }
};

}  // namespace slowfast_fast::cpu::SFF_ISA
