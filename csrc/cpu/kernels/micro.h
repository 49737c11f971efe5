// The two register tiles that every product of the package is made of.
#pragma once
#include "vec.h"

namespace slowfast_fast::cpu::SFF_ISA {

// Rows a register tile at most holds (MR) for a panel of NV vectors of W channels. MR * NV accumulators, NV weights and
// one broadcast must fit the register file: 16 vectors up to AVX2, 32 with AVX-512. A panel is chosen to be no wider
// than the channels it serves: 8 channels take 12 x 1 (24 x 1) rather than half of a 6 x 2 tile.
template <typename A_, int W_, int NV_, int MR_>
struct Tile {
  using A = A_;
  static constexpr int W = W_, NV = NV_, MR = MR_, panel = W * NV;
  using V = Vec<A, W>;
#if defined(__AVX512F__)
  static_assert(MR * NV + NV + 1 <= 32);
#else
  static_assert(MR * NV + NV + 1 <= 16);
#endif
};

#if defined(__AVX512F__)
using Wide32 = Tile<float, 16, 2, 12>;
using Mid32 = Tile<float, 16, 1, 24>;
using Narrow32 = Tile<float, 8, 1, 24>;
using Slide32 = Mid32;
using Wide64 = Tile<double, 8, 2, 12>;
#elif defined(__AVX2__)
using Wide32 = Tile<float, 8, 2, 6>;
using Mid32 = Wide32;
using Narrow32 = Tile<float, 8, 1, 12>;
using Slide32 = Narrow32;
using Wide64 = Tile<double, 4, 2, 6>;
#else
using Wide32 = Tile<float, 8, 1, 6>;  // W = 8 in two SSE or NEON registers
using Mid32 = Wide32;
using Narrow32 = Wide32;
using Slide32 = Wide32;
using Wide64 = Tile<double, 4, 1, 6>;
#endif

template <typename T>
struct Of {
  using type = T;
};

// Calls body with the register tile for k output channels, sums being of the type that T accumulates in.
template <typename T, typename Body>
SFF_INLINE auto with_tile(int64_t k, Body body) {
  if constexpr (sizeof(Acc<T>) == 8) return body(Of<Wide64>{});
  else if (k <= Narrow32::panel) return body(Of<Narrow32>{});
  else if (k <= Mid32::panel) return body(Of<Mid32>{});
  else return body(Of<Wide32>{});
}

constexpr int max_taps = 64;  // taps that one call of `product` sums; longer kernels take several

// out[i][k] (+)= sum over taps j and depth c of a[j][i * lda + c] * b[j][c * panel + k], for M rows and one panel. What
// is there is added last: a sum in parts rounds less than one long chain.
template <typename T, int M>
void product(int taps, const typename T::A* const* a, const typename T::A* const* b, int64_t lda, int64_t depth,
             typename T::A* __restrict__ out, bool accumulate) {
  using V = typename T::V;
  V acc[M][T::NV];
#pragma GCC unroll 24
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < T::NV; ++v) acc[i][v] = V{};
  for (int j = 0; j < taps; ++j) {
    const typename T::A* pa = a[j];
    const typename T::A* pb = b[j];
    for (int64_t c = 0; c < depth; ++c, ++pa, pb += T::panel) {
      V weight[T::NV];
#pragma GCC unroll 2
      for (int v = 0; v < T::NV; ++v) weight[v] = load_raw<V>(pb + v * T::W);
#pragma GCC unroll 24
      for (int i = 0; i < M; ++i) {
        const typename T::A x = pa[i * lda];
#pragma GCC unroll 2
        for (int v = 0; v < T::NV; ++v) acc[i][v] += x * weight[v];
      }
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < T::NV; ++v) {
      typename T::A* to = out + i * T::panel + v * T::W;
      store_raw(to, accumulate ? load_raw<V>(to) + acc[i][v] : acc[i][v]);
    }
}

// out[i][k] = sum over segments s and rows r of x[s][r * ldx + i] * g[s][r * ldg + k], for M channels and one panel.
template <typename T, int M>
void outer_product(int segments, const typename T::A* const* x, const typename T::A* const* g, int64_t ldx, int64_t ldg,
                   int64_t rows, typename T::A* __restrict__ out) {
  using V = typename T::V;
  V acc[M][T::NV];
#pragma GCC unroll 24
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < T::NV; ++v) acc[i][v] = V{};
  for (int s = 0; s < segments; ++s) {
    const typename T::A* px = x[s];
    const typename T::A* pg = g[s];
    for (int64_t r = 0; r < rows; ++r, px += ldx, pg += ldg) {
      V grad[T::NV];
#pragma GCC unroll 2
      for (int v = 0; v < T::NV; ++v) grad[v] = load_raw<V>(pg + v * T::W);
#pragma GCC unroll 24
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < T::NV; ++v) acc[i][v] += px[i] * grad[v];
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < T::NV; ++v) store_raw(out + i * T::panel + v * T::W, acc[i][v]);
}

template <typename T>
using Product = void (*)(int, const typename T::A* const*, const typename T::A* const*, int64_t, int64_t,
                         typename T::A*, bool);
template <typename T>
using OuterProduct = void (*)(int, const typename T::A* const*, const typename T::A* const*, int64_t, int64_t, int64_t,
                              typename T::A*);

// The kernels for 1 ... MR rows; entry [m - 1] serves m.
template <typename T, int M = T::MR>
struct Table : Table<T, M - 1> {
  constexpr Table() {
    this->products[M - 1] = product<T, M>;
    this->outer_products[M - 1] = outer_product<T, M>;
  }
};
template <typename T>
struct Table<T, 0> {
  Product<T> products[T::MR] = {};
  OuterProduct<T> outer_products[T::MR] = {};
};
template <typename T>
constexpr Table<T> table{};

// Cuts `total` rows into the fewest parts of at most `most` rows, of sizes that differ by one at most: 49 rows in parts
// of at most 6 are 4 of 6 and 5 of 5, so that no tile is nearly empty.
struct Parts {
  int64_t count, size, larger;  // the first `larger` parts have size + 1 rows
  SFF_INLINE Parts(int64_t total, int64_t most)
      : count((total + most - 1) / most), size(count ? total / count : 0), larger(count ? total % count : 0) {}
  SFF_INLINE int64_t begin(int64_t i) const { return i * size + (i < larger ? i : larger); }
  SFF_INLINE int64_t length(int64_t i) const { return size + (i < larger); }
};

}  // namespace slowfast_fast::cpu::SFF_ISA
