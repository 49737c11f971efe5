// The gradient of the weight: outer products of input rows and gradient rows, summed in register tiles over a block of rows.
#pragma once
#include "conv.h"

namespace slowfast_fast::cpu::SFF_ISA {

template <typename T, typename Tl>
struct WgradTask {
  using A = Acc<T>;
  static constexpr int W = Tl::W, panel = Tl::panel;
  static constexpr int max_frames = 64;

  const WgradPlan& plan;
  const Blocking& b;
  A* gradient;  // [frame of the block][row][k_group], unless products read the tensor itself
  A* x;         // [frame][row][c_block], likewise

  // A panel is read whole, so the tensor itself serves only when the channels fill their panels.
  static bool gradient_direct(const WgradPlan& p) { return is_direct<T>(p.gradient) && p.k % panel == 0; }
  static int64_t gradient_bytes(const WgradPlan& p) {
    return gradient_direct(p) ? 0 : align_up(p.blocking.t_block * p.blocking.p_block * p.blocking.k_group * sizeof(A));
  }
  static int64_t scratch(const WgradPlan& p) {
    const int64_t rows = p.blocking.t_block * p.blocking.p_block;
    return gradient_bytes(p) + (is_direct<T>(p.x) ? 0 : align_up(rows * p.blocking.c_block * sizeof(A)));
  }

  WgradTask(const WgradPlan& p, void* memory)
      : plan(p), b(p.blocking), gradient(static_cast<A*>(memory)),
        x(reinterpret_cast<A*>(static_cast<char*>(memory) + gradient_bytes(p))) {}

  void run(int64_t task) {
    const int64_t groups = ceil_div(plan.k, b.k_group), chunk = task / groups, k0 = task % groups * b.k_group;
    const int64_t k1 = k0 + b.k_group < plan.k ? k0 + b.k_group : plan.k, panels = ceil_div(plan.k, panel);
    A* partial = static_cast<A*>(plan.partial) + (chunk * panels + k0 / panel) * plan.kt * plan.c * panel;
    const int64_t wanted = ceil_div(k1 - k0, panel) * plan.kt * plan.c * panel;
    for (int64_t i = 0; i < wanted; ++i) partial[i] = 0;

    const Parts positions(plan.p, b.p_block);
    const int64_t blocks = plan.n * positions.count;
    if (blocks == 0) return;
    const Parts chunks(blocks, ceil_div(blocks, plan.chunks));
    if (chunk >= chunks.count) return;
    for (int64_t block = chunks.begin(chunk); block < chunks.begin(chunk) + chunks.length(chunk); ++block) {
      const int64_t n = block / positions.count, p0 = positions.begin(block % positions.count);
      const int64_t rows = positions.length(block % positions.count);
      for (int64_t t0 = 0; t0 < plan.t_out; t0 += b.t_block) {
        const int64_t t1 = t0 + b.t_block < plan.t_out ? t0 + b.t_block : plan.t_out;
        if (!gradient_direct(plan))
          for (int64_t t = t0; t < t1; ++t)
            read_rows<T, W>(plan.gradient, n, t, p0, rows, k0, k1 - k0, gradient + (t - t0) * rows * b.k_group, b.k_group);
        for (int64_t j = 0; j < plan.kt; ++j) tap(j, n, p0, rows, t0, t1, k0, k1, partial);
      }
    }
  }

  // One tap: the pairs of frames that it joins, all channels.
  void tap(int64_t j, int64_t n, int64_t p0, int64_t rows, int64_t t0, int64_t t1, int64_t k0, int64_t k1, A* partial) {
    int64_t in[max_frames], out[max_frames];
    int segments = 0;
    for (int64_t t = t0; t < t1; ++t)
      for (int64_t e = plan.taps.first[t]; e < plan.taps.first[t + 1]; ++e)
        if (plan.taps.tap[e] == j) {
          in[segments] = plan.taps.frame[e];
          out[segments++] = t;
        }
    if (segments == 0) return;
    const bool direct = is_direct<T>(plan.x), g_direct = gradient_direct(plan);
    const int64_t ldx = direct ? plan.x.rows.stride_p : b.c_block, ldg = g_direct ? plan.gradient.rows.stride_p : b.k_group;
    for (int64_t c0 = 0; c0 < plan.c; c0 += b.c_block) {
      const int64_t depth = plan.c - c0 < b.c_block ? plan.c - c0 : b.c_block;
      if (!direct)
        for (int s = 0; s < segments; ++s)
          read_rows<T, W>(plan.x, n, in[s], p0, rows, c0, depth, x + s * rows * b.c_block, b.c_block);
      const Parts tiles(depth, Tl::MR);
      for (int64_t k = k0; k < k1; k += panel) {
        const A* pg[max_frames];
        for (int s = 0; s < segments; ++s)
          pg[s] = g_direct ? reinterpret_cast<const A*>(row_at<T>(plan.gradient.rows, n, out[s], p0)) + k
                           : gradient + (out[s] - t0) * rows * b.k_group + k - k0;
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
          const A* px[max_frames];
          for (int s = 0; s < segments; ++s)
            px[s] = (direct ? reinterpret_cast<const A*>(row_at<T>(plan.x.rows, n, in[s], p0)) + c0 : x + s * rows * b.c_block) +
                    tiles.begin(tile);
          A* sum = partial + (((k - k0) / panel * plan.kt + j) * plan.c + c0 + tiles.begin(tile)) * panel;
          add_products(tiles.length(tile), segments, px, pg, ldx, ldg, rows, sum);
        }
      }
    }
  }

  // sum += the outer products of all segments. A register tile sums at most `summed_rows` rows before it goes into a sum in double, unless
  // one register tile takes them all.
  void add_products(int64_t m, int segments, const A* const* px, const A* const* pg, int64_t ldx, int64_t ldg, int64_t rows, A* sum) {
    const int64_t step = plan.summed_rows / rows > 1 ? plan.summed_rows / rows : 1, size = m * panel;
    const auto product = table<Tl>.outer_products[m - 1];
    A tile[Tl::MR * panel];
    if (step >= segments) {
      product(segments, px, pg, ldx, ldg, rows, tile);
      for (int64_t e = 0; e < size; ++e) sum[e] += tile[e];
      return;
    }
    double total[Tl::MR * panel] = {};
    for (int64_t s = 0; s < segments; s += step) {
      product(int(segments - s < step ? segments - s : step), px + s, pg + s, ldx, ldg, rows, tile);
      for (int64_t e = 0; e < size; ++e) total[e] += tile[e];
    }
    for (int64_t e = 0; e < size; ++e) sum[e] += A(total[e]);
  }
};

}  // namespace slowfast_fast::cpu::SFF_ISA
