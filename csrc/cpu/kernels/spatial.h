// A 3 x 3 convolution of images at stride 1 by Winograd's minimal filtering F(2 x 2, 3 x 3) (Winograd 1980; Lavin &
// Gray, CVPR 2016): the four outputs of a tile from the 4 x 4 positions that they see, with 16 products instead of 36.
// It is winograd.h's filter along both dimensions:
//
//   V = B^T d B    U = G g G^T    M = sum over c of V * U    y = A^T M A
//
//   B^T = 1  0 -1  0    G =  1    0    0      A^T = 1  1  1  0
//         0  1  1  0        1/2  1/2  1/2           0  1 -1 -1
//         0 -1  1  0        1/2 -1/2  1/2
//         0  1  0 -1         0    0    1
//
// The tiles of all images are one sequence, so that register tiles are full on small images too. The sums over c are a
// ninth of the direct length, which makes up for what the transforms round. What is not finite reaches the outputs that
// it reaches in a direct sum: d0 takes part in V0 and so in y0 alone, d3 in V3 and y1.
#pragma once
#include "conv.h"

namespace slowfast_fast::cpu::SFF_ISA {

constexpr int patch = 16;  // matrices, and positions that a tile sees

// B^T v along one dimension.
template <typename V>
SFF_INLINE void transform_line(V d0, V d1, V d2, V d3, V* to) {
  to[0] = d0 - d2;
  to[1] = d1 + d2;
  to[2] = d2 - d1;
  to[3] = d1 - d3;
}

// to[v * next + c] = V of the patch whose position i has its channels at d[i].
template <typename T, int W>
void transform_patch(const T* const* d, int64_t depth, Acc<T>* to, int64_t next) {
  using V = Vec<Acc<T>, W>;
  for (int64_t c = 0; c < depth; c += W) {
    const int64_t count = depth - c;
    const auto line = [&](int row, V* out) {
      const T* const* p = d + 4 * row;
      transform_line(load<W>(p[0] + c, count), load<W>(p[1] + c, count), load<W>(p[2] + c, count),
                     load<W>(p[3] + c, count), out);
    };
    const auto put = [&](int row, int column, V v) { store<W>(to + (4 * row + column) * next + c, v, count); };
    V outer[4], r1[4], r2[4];  // no more than three lines live: registers are few
    line(2, r2);
    line(0, outer);
    for (int i = 0; i < 4; ++i) put(0, i, outer[i] - r2[i]);
    line(1, r1);
    for (int i = 0; i < 4; ++i) put(1, i, r1[i] + r2[i]);
    for (int i = 0; i < 4; ++i) put(2, i, r2[i] - r1[i]);
    line(3, outer);
    for (int i = 0; i < 4; ++i) put(3, i, r1[i] - outer[i]);
  }
}

// y[2 * row + column] of the matrices m[v * next].
template <typename V, typename A>
SFF_INLINE void transform_sums(const A* m, int64_t next, V* y) {
  V upper[4], lower[4];  // A^T M, column by column
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const V m0 = load_raw<V>(m + i * next), m1 = load_raw<V>(m + (4 + i) * next), m2 = load_raw<V>(m + (8 + i) * next),
            m3 = load_raw<V>(m + (12 + i) * next);
    upper[i] = m0 + m1 + m2;
    lower[i] = m1 - m2 - m3;
  }
  y[0] = upper[0] + upper[1] + upper[2];
  y[1] = upper[1] - upper[2] - upper[3];
  y[2] = lower[0] + lower[1] + lower[2];
  y[3] = lower[1] - lower[2] - lower[3];
}

// The tiles of 2 x 2 outputs of all images, one after the other.
struct Tiles {
  const int64_t frames, height, width, columns, per_image;

  Tiles(int64_t t, int64_t h, int64_t w)
      : frames(t), height(h), width(w), columns(ceil_div(w, 2)), per_image(ceil_div(h, 2) * columns) {}

  struct Place {
    int64_t n, t, h, w;  // of a tile's first output
  };
  SFF_INLINE Place place(int64_t index) const {
    const int64_t image = index / per_image, tile = index % per_image;
    return {image / frames, image % frames, tile / columns * 2, tile % columns * 2};
  }

  // The channels from c0 on at (h, w) of a tile's image; `zeros` outside of it.
  template <typename T>
  SFF_INLINE const T* position(const Rows& x, const Place& at, int64_t h, int64_t w, int64_t c0, const T* zeros) const {
    const bool inside = h >= 0 && h < height && w >= 0 && w < width;
    return inside ? row_at<T>(x, at.n, at.t, h * width + w) + c0 : zeros;
  }

  template <typename T>
  SFF_INLINE void patch_at(const Rows& x, const Place& at, int64_t c0, const T* zeros, const T** d) const {
    for (int64_t i = 0; i < patch; ++i) d[i] = position(x, at, at.h + i / 4 - 1, at.w + i % 4 - 1, c0, zeros);
  }
};

// Values from one of the 16 matrices to the next: an odd number of cache lines, so that they do not compete for the
// same sets of L1.
template <typename A>
constexpr int64_t apart(int64_t values) {
  constexpr int64_t line = 64 / int64_t(sizeof(A));
  return (ceil_div(values, line) | 1) * line;
}

template <typename T, typename Tl>
struct SpatialTask {
  using A = Acc<T>;
  using V = typename Tl::V;
  static constexpr int W = Tl::W, panel = Tl::panel;

  const SpatialPlan& plan;
  const Tiles image_tiles;
  const int64_t sums_next, input_next;  // values between matrices
  A* sums;         // [panel of the group, or one when the depth is one block][M0 ... M15][tile][panel]
  A* transformed;  // [V0 ... V15][tile][c_block]
  T* zeros;        // [c_block]: a position outside the image
  int64_t first, tiles, k0, panels;

  static int64_t sums_bytes(const SpatialPlan& p) {
    return align_up((p.shape.c > p.c_block ? p.k_group / panel : 1) * patch * apart<A>(p.tiles * panel) *
                    int64_t(sizeof(A)));
  }
  static int64_t transformed_bytes(const SpatialPlan& p) {
    return align_up(patch * apart<A>(p.tiles * p.c_block) * int64_t(sizeof(A)));
  }
  static int64_t zeros_bytes(const SpatialPlan& p) { return align_up(p.c_block * int64_t(sizeof(T))); }
  static int64_t scratch(const SpatialPlan& p) { return sums_bytes(p) + transformed_bytes(p) + zeros_bytes(p); }

  SpatialTask(const SpatialPlan& p, void* memory)
      : plan(p),
        image_tiles(p.shape.t, p.shape.h, p.shape.w),
        sums_next(apart<A>(p.tiles * panel)),
        input_next(apart<A>(p.tiles * p.c_block)),
        sums(static_cast<A*>(memory)) {
    char* rest = static_cast<char*>(memory) + sums_bytes(p);
    transformed = reinterpret_cast<A*>(rest);
    zeros = reinterpret_cast<T*>(rest + transformed_bytes(p));
    __builtin_memset(zeros, 0, size_t(zeros_bytes(p)));
  }

  void run(int64_t task) {
    const int64_t groups = ceil_div(plan.shape.k, plan.k_group);
    const Parts parts(plan.shape.n * plan.shape.t * image_tiles.per_image, plan.tiles);
    first = parts.begin(task / groups);
    tiles = parts.length(task / groups);
    k0 = task % groups * plan.k_group;
    const int64_t k1 = k0 + plan.k_group < plan.shape.k ? k0 + plan.k_group : plan.shape.k;
    panels = ceil_div(k1 - k0, panel);
    for (int64_t c0 = 0; c0 < plan.shape.c; c0 += plan.c_block) {
      const int64_t depth = plan.shape.c - c0 < plan.c_block ? plan.shape.c - c0 : plan.c_block;
      for (int64_t i = 0; i < tiles; ++i) read(i, c0, depth);
      for (int64_t i = 0; i < panels; ++i) {
        products(i, c0, depth);
        if (c0 + depth == plan.shape.c)
          for (int64_t j = 0; j < tiles; ++j) write(i, j);
      }
    }
  }

  void read(int64_t i, int64_t c0, int64_t depth) {
    const T* d[patch];
    image_tiles.patch_at(plan.x, image_tiles.place(first + i), c0, zeros, d);
    transform_patch<T, W>(d, depth, transformed + i * plan.c_block, input_next);
  }

  A* sums_of(int64_t i, int64_t v, int64_t j) const {
    const int64_t slot = plan.shape.c > plan.c_block ? i : 0;
    return sums + (slot * patch + v) * sums_next + j * panel;
  }

  const A* weights(int64_t i, int64_t c0) const {
    return static_cast<const A*>(plan.weight) + ((k0 / panel + i) * plan.shape.c + c0) * patch * panel;
  }

  // One panel of all tiles, for one block of the depth: a matrix stays in L1 while the tiles stream past it, and the
  // next one is asked for meanwhile, which comes from L3 or memory.
  void products(int64_t i, int64_t c0, int64_t depth) {
    const Parts rows(tiles, Tl::MR);
    const int64_t size = depth * panel;
    const A* weight = weights(i, c0);
    for (int64_t v = 0; v < patch; ++v, weight += size) {
      const A* next = v + 1 < patch ? weight + size : after(i, c0, depth);
      for (int64_t j = 0; j < rows.count; ++j) {
        const int64_t r0 = rows.begin(j), m = rows.length(j), share = size * (j + 1) / rows.count;
        for (int64_t e = size * j / rows.count; e < share; e += 64 / int64_t(sizeof(A))) __builtin_prefetch(next + e);
        const A* pa = transformed + v * input_next + r0 * plan.c_block;
        table<Tl>.products[m - 1](1, &pa, &weight, plan.c_block, depth, sums_of(i, v, r0), c0 > 0);
      }
    }
  }

  // The weights that are read after those of panel i.
  const A* after(int64_t i, int64_t c0, int64_t depth) const {
    if (i + 1 < panels) return weights(i + 1, c0);
    return weights(0, c0 + depth < plan.shape.c ? c0 + depth : 0);
  }

  void write(int64_t i, int64_t j) {
    const Tiles::Place at = image_tiles.place(first + j);
    const int64_t k = k0 + i * panel, channels = plan.shape.k - k < panel ? plan.shape.k - k : panel;
    for (int64_t c = 0; c < channels; c += W) {
      V y[4];
      transform_sums(sums_of(i, 0, j) + c, sums_next, y);
      const V shift = plan.shift ? load<W>(static_cast<const A*>(plan.shift) + k + c) : V{};
#pragma GCC unroll 4
      for (int64_t o = 0; o < 4; ++o) {
        const int64_t h = at.h + o / 2, w = at.w + o % 2;
        if (h >= plan.shape.h || w >= plan.shape.w) continue;
        V v = y[o] + shift;
        const T* residual = row_at<T>(plan.residual, at.n, at.t, h * plan.shape.w + w);
        if (residual) v += load<W>(residual + k + c, channels - c);
        store<W>(row_at<T>(plan.y, at.n, at.t, h * plan.shape.w + w) + k + c, plan.relu ? relu(v) : v, channels - c);
      }
    }
  }
};

// G g along one dimension.
template <typename V>
SFF_INLINE void filter_line(V g0, V g1, V g2, V* to) {
  const V outer = (g0 + g2) / 2, middle = g1 / 2;
  to[0] = g0;
  to[1] = outer + middle;
  to[2] = outer - middle;
  to[3] = g2;
}

// to[v * next] = U of the weight whose element (i, j) is at g[(3 * i + j) * vector_pad].
template <typename V, typename A>
SFF_INLINE void transform_filter(const A* g, A* to, int64_t next) {
  V half[3][4];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j)
    filter_line(load_raw<V>(g + j * vector_pad), load_raw<V>(g + (3 + j) * vector_pad),
                load_raw<V>(g + (6 + j) * vector_pad), half[j]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    V line[4];
    filter_line(half[0][i], half[1][i], half[2][i], line);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store_raw(to + (4 * i + j) * next, line[j]);
  }
}

// Tasks: panels.
template <typename T, int W>
void pack_spatial_weight(const SpatialPackPlan& plan, int64_t begin, int64_t end) {
  using A = Acc<T>;
  A g[9 * vector_pad] = {};
  for (int64_t index = begin; index < end; ++index) {
    A* to = static_cast<A*>(plan.to) + index * plan.c * patch * plan.panel;
    const int64_t k0 = index * plan.panel, lanes = plan.k - k0 < plan.panel ? plan.k - k0 : plan.panel;
    for (int64_t i = 0; lanes < plan.panel && i < 9 * vector_pad; ++i) g[i] = 0;
    for (int64_t c0 = 0; c0 < plan.c; c0 += plan.c_block, to += plan.c_block * patch * plan.panel) {
      const int64_t depth = plan.c - c0 < plan.c_block ? plan.c - c0 : plan.c_block;
      for (int64_t c = 0; c < depth; ++c) {
        const T* from = static_cast<const T*>(plan.from) + k0 * plan.stride_k + (c0 + c) * plan.stride_c;
        for (int64_t l = 0; l < lanes; ++l, from += plan.stride_k)
          for (int64_t i = 0; i < 3; ++i)
            for (int64_t j = 0; j < 3; ++j)
              g[(3 * i + j) * vector_pad + l] = widen(from[i * plan.stride_h + j * plan.stride_w]);
        for (int64_t l = 0; l < plan.panel; l += W)
          transform_filter<Vec<A, W>>(g + l, to + c * plan.panel + l, depth * plan.panel);
      }
    }
  }
}

}  // namespace slowfast_fast::cpu::SFF_ISA
