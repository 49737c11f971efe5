// A layer of a bottleneck block in register tiles: products, shift, residual and ReLU, then one store.
#pragma once
#include "../plan.h"
#include "micro.h"

namespace slowfast_fast::cpu::SFF_ISA {

// One product of a layer: rows lda apart, `depth` values of each, times weight[depth][panel].
template <typename A>
struct Operand {
  const A* rows;
  int64_t lda;
  const A* weight;
  int64_t depth;
};

// out[i][k] = relu(the sum of the products + shift[k] + residual[i][k]), for M rows and one panel. residual may be
// absent. What is added to the sum is added last: partial sums of its size would round more.
template <typename T, int M>
void layer(const Operand<typename T::A>* operand, int operands, const typename T::A* shift,
           const typename T::A* residual, int64_t residual_next, typename T::A* __restrict__ out, int64_t out_next) {
  using A = typename T::A;
  using V = typename T::V;
  V acc[M][T::NV];
#pragma GCC unroll 24
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < T::NV; ++v) acc[i][v] = V{};
  for (; operands > 0; --operands, ++operand) {
    const A *rows = operand->rows, *weight = operand->weight;
    const int64_t lda = operand->lda;
    for (int64_t c = 0; c < operand->depth; ++c, ++rows, weight += T::panel) {
      V w[T::NV];
#pragma GCC unroll 2
      for (int v = 0; v < T::NV; ++v) w[v] = load_raw<V>(weight + v * T::W);
#pragma GCC unroll 24
      for (int i = 0; i < M; ++i) {
        const A value = rows[i * lda];
#pragma GCC unroll 2
        for (int v = 0; v < T::NV; ++v) acc[i][v] += value * w[v];
      }
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < T::NV; ++v) {
      acc[i][v] += load_raw<V>(shift + v * T::W);
      if (residual) acc[i][v] += load_raw<V>(residual + i * residual_next + v * T::W);
      store_raw(out + i * out_next + v * T::W, relu(acc[i][v]));
    }
}

template <typename A>
using Layer = void (*)(const Operand<A>*, int, const A*, const A*, int64_t, A*, int64_t);

// The kernels for 1 ... MR rows; entry [m - 1] serves m.
template <typename T, int M = T::MR>
struct LayerTable : LayerTable<T, M - 1> {
  constexpr LayerTable() { this->entry[M - 1] = layer<T, M>; }
};
template <typename T>
struct LayerTable<T, 0> {
  Layer<typename T::A> entry[T::MR] = {};
};
template <typename T>
constexpr LayerTable<T> layer_table{};

// The register tile that serves a number of output channels, the same that weights are packed for.
template <typename A>
struct LayerTile {
  int64_t rows, panel, panels;
  const Layer<A>* entry;

  explicit LayerTile(int64_t channels) {
    with_tile<A>(channels, [&](auto tile) {
      using Tl = typename decltype(tile)::type;
      rows = Tl::MR;
      panel = Tl::panel;
      entry = layer_table<Tl>.entry;
    });
    panels = ceil_div(channels, panel);
  }
  int64_t padded() const { return panels * panel; }
};

}  // namespace slowfast_fast::cpu::SFF_ISA
