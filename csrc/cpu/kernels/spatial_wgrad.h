// The gradient of a 3 x 3 weight by the transposes of spatial.h's maps: the patches of the input, V, meet the 2 x 2
// outputs' gradients, H = A dy A^T, in 16 outer products a tile, and finish_spatial_wgrad turns their sums U into
// G^T U G.
#pragma once
#include "spatial.h"

namespace slowfast_fast::cpu::SFF_ISA {

// A g along one dimension.
template <typename V>
SFF_INLINE void spread_line(V g0, V g1, V* to) {
  to[0] = g0;
  to[1] = g0 + g1;
  to[2] = g0 - g1;
  to[3] = -g1;
}

template <typename T, typename Tl>
struct SpatialWgradTask {
  using A = Acc<T>;
  using V = typename Tl::V;
  static constexpr int W = Tl::W, panel = Tl::panel;

  const SpatialWgradPlan& plan;
  const Tiles tiles;
  const int64_t x_next, gradient_next;  // values between matrices
  A* x;                                 // [V0 ... V15][tile][c_block]
  A* gradient;                          // [H0 ... H15][tile][k_block]
  T* zeros;                             // [the larger of both]: a position outside the image

  static int64_t zeros_bytes(const SpatialWgradPlan& p) {
    return align_up((p.c_block > p.k_block ? p.c_block : p.k_block) * int64_t(sizeof(T)));
  }
  static int64_t matrices_bytes(int64_t values) { return align_up(patch * apart<A>(values) * int64_t(sizeof(A))); }
  static int64_t scratch(const SpatialWgradPlan& p) {
    return matrices_bytes(p.tiles * p.c_block) + matrices_bytes(p.tiles * p.k_block) + zeros_bytes(p);
  }

  SpatialWgradTask(const SpatialWgradPlan& p, void* memory)
      : plan(p),
        tiles(p.shape.t, p.shape.h, p.shape.w),
        x_next(apart<A>(p.tiles * p.c_block)),
        gradient_next(apart<A>(p.tiles * p.k_block)),
        x(static_cast<A*>(memory)) {
    char* rest = static_cast<char*>(memory) + matrices_bytes(p.tiles * p.c_block);
    gradient = reinterpret_cast<A*>(rest);
    zeros = reinterpret_cast<T*>(rest + matrices_bytes(p.tiles * p.k_block));
    __builtin_memset(zeros, 0, size_t(zeros_bytes(p)));
  }

  void run(int64_t task) {
    const int64_t c_blocks = ceil_div(plan.shape.c, plan.c_block), k_blocks = ceil_div(plan.shape.k, plan.k_block);
    const int64_t c0 = task % c_blocks * plan.c_block, k0 = task / c_blocks % k_blocks * plan.k_block,
                  chunk = task / c_blocks / k_blocks;
    const int64_t depth = plan.shape.c - c0 < plan.c_block ? plan.shape.c - c0 : plan.c_block;
    const int64_t width = plan.shape.k - k0 < plan.k_block ? plan.shape.k - k0 : plan.k_block,
                  panels = ceil_div(width, panel);
    A* partial = static_cast<A*>(plan.partial) +
                 ((chunk * ceil_div(plan.shape.k, panel) + k0 / panel) * patch * plan.shape.c + c0) * panel;
    const Parts blocks(plan.shape.n * plan.shape.t * tiles.per_image, plan.tiles),
        chunks(blocks.count, plan.blocks_of_a_chunk);
    for (int64_t b = 0; b < chunks.length(chunk); ++b) {
      const int64_t block = chunks.begin(chunk) + b, first = blocks.begin(block), count = blocks.length(block);
      for (int64_t i = 0; i < count; ++i) read(first + i, i, c0, depth, k0, width);
      for (int64_t v = 0; v < patch; ++v)
        for (int64_t i = 0; i < panels; ++i)
          products(v, i, count, depth, partial + (i * patch + v) * plan.shape.c * panel, b > 0);
    }
  }

  void read(int64_t tile, int64_t i, int64_t c0, int64_t depth, int64_t k0, int64_t width) {
    const Tiles::Place at = tiles.place(tile);
    const T* seen[patch];
    tiles.patch_at(plan.x, at, c0, zeros, seen);
    transform_patch<T, W>(seen, depth, x + i * plan.c_block, x_next);
    const T* g[4];
    for (int64_t o = 0; o < 4; ++o) g[o] = tiles.position(plan.grad, at, at.h + o / 2, at.w + o % 2, k0, zeros);
    A* to = gradient + i * plan.k_block;
    for (int64_t k = 0; k < ceil_div(width, panel) * panel; k += W) {
      V dy[4], upper[4], lower[4];
      for (int o = 0; o < 4; ++o) dy[o] = k < width ? load<W>(g[o] + k, width - k) : V{};
      spread_line(dy[0], dy[1], upper);
      spread_line(dy[2], dy[3], lower);
      for (int column = 0; column < 4; ++column) {
        V line[4];
        spread_line(upper[column], lower[column], line);
        for (int row = 0; row < 4; ++row) store<W>(to + (4 * row + column) * gradient_next + k, line[row]);
      }
    }
  }

  // partial[c][channel of panel i] (+)= the sum over the block's tiles.
  void products(int64_t v, int64_t i, int64_t count, int64_t depth, A* partial, bool accumulate) {
    const A* g = gradient + v * gradient_next + i * panel;
    A sums[Tl::MR * panel];
    for (int64_t c = 0; c < depth; c += Tl::MR) {
      const int64_t m = depth - c < Tl::MR ? depth - c : Tl::MR;
      const A* from = x + v * x_next + c;
      table<Tl>.outer_products[m - 1](1, &from, &g, plan.c_block, plan.k_block, count, sums);
      A* to = partial + c * panel;
      for (int64_t e = 0; e < m * panel; e += W)
        store<W>(to + e, accumulate ? load<W>(to + e) + load<W>(sums + e) : load<W>(sums + e));
    }
  }
};

// Tasks: panels.
template <typename T>
void finish_spatial_wgrad(const SpatialWeightGradientPlan& plan, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t panels = ceil_div(plan.k, plan.panel), chunk_size = panels * patch * plan.c * plan.panel;
  for (int64_t index = begin; index < end; ++index)
    for (int64_t c = 0; c < plan.c; ++c) {
      double u[patch][vector_pad] = {};
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        const A* sums =
            static_cast<const A*>(plan.partial) + chunk * chunk_size + (index * patch * plan.c + c) * plan.panel;
        for (int64_t v = 0; v < patch; ++v)
          for (int64_t l = 0; l < plan.panel; ++l) u[v][l] += sums[v * plan.c * plan.panel + l];
      }
      const int64_t k0 = index * plan.panel;
      for (int64_t l = 0; l < plan.panel && k0 + l < plan.k; ++l) {
        T* to = static_cast<T*>(plan.to) + (k0 + l) * plan.stride_k + c * plan.stride_c;
        double half[4][3];  // U G
        const auto taps = [](double u0, double u1, double u2, double u3, double* g) {
          g[0] = u0 + (u1 + u2) / 2;
          g[1] = (u1 - u2) / 2;
          g[2] = (u1 + u2) / 2 + u3;
        };
        for (int64_t r = 0; r < 4; ++r) taps(u[4 * r][l], u[4 * r + 1][l], u[4 * r + 2][l], u[4 * r + 3][l], half[r]);
        for (int64_t j = 0; j < 3; ++j) {
          double column[3];
          taps(half[0][j], half[1][j], half[2][j], half[3][j], column);
          for (int64_t i = 0; i < 3; ++i) narrow(A(column[i]), to + i * plan.stride_h + j * plan.stride_w);
        }
      }
    }
}

}  // namespace slowfast_fast::cpu::SFF_ISA
