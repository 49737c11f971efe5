// The gradient of the weight: outer products of input rows and gradient rows, summed in register tiles over a block of
// rows.
//
// Direct: for every tap the pairs of frames that it joins. Winograd: the transposes of winograd.h's maps; V0 ... V3 of
// the input meet H0 = g0, H1 = g0 + g1, H2 = g0 - g1, H3 = -g1 of the gradient's frame pairs, and wgrad_result turns
// the four sums into three taps.
#pragma once
#include "winograd.h"

namespace slowfast_fast::cpu::SFF_ISA {

template <typename T, typename Tl>
struct WgradTask {
  using A = typename Tl::A;
  using V = typename Tl::V;
  static constexpr int W = Tl::W, panel = Tl::panel;
  static constexpr int max_frames = 64;

  const WgradPlan& plan;
  const Blocking& b;
  A* gradient;  // [frame, or pair and H][row][k_group], unless products read the tensor itself
  A* x;         // [frame, or pair and V][row][c_block], likewise
  A* buffer;    // one row of a block's frames
  int64_t n, p0, rows, t0, t1, k0, k1, from, to, matrices;

  // A panel of the gradient is read whole, so the tensor itself serves only when the channels fill their panels.
  static bool gradient_direct(const WgradPlan& p) {
    return !p.winograd && is_direct<T, A>(p.gradient) && p.k % panel == 0;
  }
  // Far rows would share a few sets of the cache: one column of them is read at a time.
  static bool x_direct(const WgradPlan& p) {
    return !p.winograd && !p.ones && is_direct<T, A>(p.x) && p.x.rows.stride_p <= 128;
  }

  static int64_t source_frames(const WgradPlan& p) {
    if (p.winograd) return ceil_div(p.blocking.t_block, 2) * 4;
    int64_t most = 0;
    for (int64_t t = 0; t < p.t_out; t += p.blocking.t_block) {
      int64_t from, to;
      source_range(p.taps, p.t_in, t, t + p.blocking.t_block < p.t_out ? t + p.blocking.t_block : p.t_out, &from, &to);
      if (to - from > most) most = to - from;
    }
    return most;
  }
  static int64_t gradient_bytes(const WgradPlan& p) {
    const int64_t frames = p.winograd ? ceil_div(p.blocking.t_block, 2) * 4 : p.blocking.t_block;
    return gradient_direct(p) ? 0 : align_up(frames * p.blocking.p_block * p.blocking.k_group * sizeof(A));
  }
  static int64_t x_bytes(const WgradPlan& p) {
    return x_direct(p) ? 0 : align_up(source_frames(p) * p.blocking.p_block * p.blocking.c_block * sizeof(A));
  }
  static int64_t buffer_bytes(const WgradPlan& p) {
    const int64_t widest = p.blocking.c_block > p.blocking.k_group ? p.blocking.c_block : p.blocking.k_group;
    return p.winograd ? align_up((p.blocking.t_block + 3) * widest * sizeof(A)) : 0;
  }
  static int64_t scratch(const WgradPlan& p) { return gradient_bytes(p) + x_bytes(p) + buffer_bytes(p); }

  WgradTask(const WgradPlan& p, void* memory)
      : plan(p),
        b(p.blocking),
        gradient(static_cast<A*>(memory)),
        x(reinterpret_cast<A*>(static_cast<char*>(memory) + gradient_bytes(p))),
        buffer(reinterpret_cast<A*>(static_cast<char*>(memory) + gradient_bytes(p) + x_bytes(p))),
        matrices(p.winograd ? 4 : p.kt) {}

  void run(int64_t task) {
    const int64_t groups = ceil_div(plan.k, b.k_group), chunk = task / groups, panels = ceil_div(plan.k, panel);
    k0 = task % groups * b.k_group;
    k1 = k0 + b.k_group < plan.k ? k0 + b.k_group : plan.k;
    A* partial = static_cast<A*>(plan.partial) + (chunk * panels + k0 / panel) * matrices * plan.c * panel;
    const int64_t size = ceil_div(k1 - k0, panel) * matrices * plan.c * panel;
    for (int64_t i = 0; i < size; ++i) partial[i] = 0;

    const Parts positions(plan.p, b.p_block);
    const int64_t blocks = plan.n * positions.count;
    if (blocks == 0) return;
    const Parts chunks(blocks, ceil_div(blocks, plan.chunks));
    if (chunk >= chunks.count) return;
    for (int64_t block = chunks.begin(chunk); block < chunks.begin(chunk) + chunks.length(chunk); ++block) {
      n = block / positions.count;
      p0 = positions.begin(block % positions.count);
      rows = positions.length(block % positions.count);
      for (t0 = 0; t0 < plan.t_out; t0 += b.t_block) {
        t1 = t0 + b.t_block < plan.t_out ? t0 + b.t_block : plan.t_out;
        source_range(plan.taps, plan.t_in, t0, t1, &from, &to);
        read_gradient();
        for (int64_t c0 = 0; c0 < plan.c; c0 += b.c_block) {
          const int64_t depth = plan.c - c0 < b.c_block ? plan.c - c0 : b.c_block;
          read_x(c0, depth);
          for (int64_t j = 0; j < matrices; ++j) products(j, c0, depth, partial);
        }
      }
    }
  }

  void read_gradient() {
    if (gradient_direct(plan)) return;
    if (!plan.winograd) {
      for (int64_t t = t0; t < t1; ++t)
        read_rows<T, W>(plan.gradient, n, t, p0, rows, k0, k1 - k0, gradient + (t - t0) * rows * b.k_group, b.k_group);
      return;
    }
    const int64_t next = rows * b.k_group;
    A *g0 = buffer, *g1 = buffer + b.k_group;
    for (int64_t pair = 0; pair < ceil_div(t1 - t0, 2); ++pair)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t t = t0 + 2 * pair;
        read_rows<T, W>(plan.gradient, n, t, p0 + r, 1, k0, k1 - k0, g0, b.k_group);
        if (t + 1 < t1) read_rows<T, W>(plan.gradient, n, t + 1, p0 + r, 1, k0, k1 - k0, g1, b.k_group);
        else
          for (int64_t k = 0; k < b.k_group; ++k) g1[k] = 0;
        A* h = gradient + (pair * 4 * rows + r) * b.k_group;
        for (int64_t k = 0; k < b.k_group; k += W) {
          const V v0 = load<W>(g0 + k), v1 = load<W>(g1 + k);
          store<W>(h + k, v0);
          store<W>(h + next + k, v0 + v1);
          store<W>(h + 2 * next + k, v0 - v1);
          store<W>(h + 3 * next + k, -v1);
        }
      }
  }

  void read_x(int64_t c0, int64_t depth) {
    if (x_direct(plan)) return;
    if constexpr (__is_same(A, Acc<T>)) {  // Winograd sums in no wider type
      for (int64_t r = 0; plan.winograd && r < rows; ++r)
        transform_source<T, W>(plan.x, n, p0 + r, t0 + plan.lead, plan.t_in, ceil_div(t1 - t0, 2), c0, depth, b.c_block,
                               buffer, x + r * b.c_block, rows * b.c_block);
      if (plan.winograd) return;
    }
    const bool one = plan.ones && c0 + depth == plan.c;
    for (int64_t f = from; f < to; ++f) {
      A* block = x + (f - from) * rows * b.c_block;
      read_rows<T, W>(plan.x, n, f, p0, rows, c0, depth - one, block, b.c_block);
      for (int64_t r = 0; one && r < rows; ++r) block[r * b.c_block + depth - 1] = 1;
    }
  }

  // The outer products of matrix j (a tap, or V_j and H_j), all channels of the block.
  void products(int64_t j, int64_t c0, int64_t depth, A* partial) {
    const A *left[max_frames], *right[max_frames];
    int segments = 0;
    if (plan.winograd) {
      for (int64_t pair = 0; pair < ceil_div(t1 - t0, 2); ++pair, ++segments) {
        left[segments] = x + (pair * 4 + j) * rows * b.c_block;
        right[segments] = gradient + (pair * 4 + j) * rows * b.k_group;
      }
    } else {
      for (int64_t t = t0; t < t1; ++t)
        for (int64_t e = plan.taps.first[t]; e < plan.taps.first[t + 1]; ++e) {
          if (plan.taps.tap[e] != j) continue;
          const int64_t f = plan.taps.frame[e];
          left[segments] = x_direct(plan) ? reinterpret_cast<const A*>(row_at<T>(plan.x.rows, n, f, p0)) + c0
                                          : x + (f - from) * rows * b.c_block;
          right[segments++] = gradient_direct(plan)
                                  ? reinterpret_cast<const A*>(row_at<T>(plan.gradient.rows, n, t, p0)) + k0
                                  : gradient + (t - t0) * rows * b.k_group;
        }
    }
    const int64_t ldx = x_direct(plan) ? plan.x.rows.stride_p : b.c_block;
    const int64_t ldg = gradient_direct(plan) ? plan.gradient.rows.stride_p : b.k_group;
    const Parts tiles(depth, Tl::MR);
    for (int64_t k = k0; k < k1; k += panel)
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const A *px[max_frames], *pg[max_frames];
        for (int s = 0; s < segments; ++s) {
          px[s] = left[s] + tiles.begin(tile);
          pg[s] = right[s] + k - k0;
        }
        add_products(tiles.length(tile), segments, px, pg, ldx, ldg,
                     partial + (((k - k0) / panel * matrices + j) * plan.c + c0 + tiles.begin(tile)) * panel);
      }
  }

  // sum += the outer products of all segments. A register tile sums at most `summed_rows` rows before it goes into a
  // sum in double, unless one register tile takes them all.
  void add_products(int64_t m, int segments, const A* const* px, const A* const* pg, int64_t ldx, int64_t ldg, A* sum) {
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
