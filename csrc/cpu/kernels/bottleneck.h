// A whole bottleneck block at a time: a thread keeps the inner activations of a band of rows in its cache, and stores
// the result once.
#pragma once
#include "micro.h"
#include "source.h"

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

template <typename T>
struct BottleneckTask {
  using A = Acc<T>;
  // Products read x itself, or rows of it that are converted first.
  static constexpr bool in_place = sizeof(T) == sizeof(A);
  static constexpr int W = sizeof(A) == 8 ? Wide64::W : Narrow32::W;
  static constexpr int64_t line = 64 / int64_t(sizeof(A));

  const BottleneckPlan& plan;
  const Bottleneck& block;
  const LayerTile<A> inner, outer;
  // a: [frame][row][column][padded(J)], rows and columns with the padding of b, so that b's taps need no conditions.
  const int64_t a_column, a_row, a_frame;
  const int64_t b_row, b_frame;
  A *a, *b, *tile;
  A* converted;  // [tap][column][C]
  Operand<A>* operands;
  const A** source;  // [tap]

  int64_t n, t0, t1, r0, r1;

  static int64_t a_rows(const BottleneckPlan& p) { return (p.rows - 1) * p.block.stride + 1 + 2 * p.block.dilation; }
  static int64_t align(int64_t values) { return (values + line - 1) / line * line; }

  struct Sizes {
    int64_t a, b, tile, converted, operands, source, total;
    explicit Sizes(const BottleneckPlan& p) {
      const int64_t j = LayerTile<A>(p.block.j).padded();
      a = align(p.frames * a_rows(p) * (p.block.w + 2 * p.block.dilation) * j);
      b = align(p.frames * p.rows * p.w_out * j);
      tile = align(2 * LayerTile<A>(p.block.k).rows * LayerTile<A>(p.block.k).panel);
      converted = in_place ? 0 : align(p.block.kt * p.block.w * p.block.c);
      const int64_t count = p.block.kt > 9 ? p.block.kt : 9;
      operands = align(count * int64_t(sizeof(Operand<A>) / sizeof(A)));
      source = align(p.block.kt * int64_t(sizeof(void*)) / int64_t(sizeof(A)));
      total = a + b + tile + converted + operands + source;
    }
  };
  static int64_t scratch(const BottleneckPlan& p) { return Sizes(p).total * int64_t(sizeof(A)); }

  BottleneckTask(const BottleneckPlan& p, void* memory)
      : plan(p),
        block(p.block),
        inner(p.block.j),
        outer(p.block.k),
        a_column(inner.padded()),
        a_row((p.block.w + 2 * p.block.dilation) * a_column),
        a_frame(a_rows(p) * a_row),
        b_row(p.w_out * a_column),
        b_frame(p.rows * b_row) {
    const Sizes sizes(p);
    a = static_cast<A*>(memory);
    b = a + sizes.a;
    tile = b + sizes.b;
    converted = tile + sizes.tile;
    operands = reinterpret_cast<Operand<A>*>(converted + sizes.converted);
    source = reinterpret_cast<const A**>(converted + sizes.converted + sizes.operands);
    __builtin_memset(a, 0, size_t(sizes.a) * sizeof(A));  // the columns beside the image stay 0
  }

  void run(int64_t task) {
    const int64_t t_blocks = ceil_div(block.t, plan.frames), bands = ceil_div(plan.h_out, plan.rows);
    const Parts frames(block.t, plan.frames), rows(plan.h_out, plan.rows);
    const int64_t f = task % t_blocks, band = task / t_blocks % bands;
    n = task / t_blocks / bands;
    t0 = frames.begin(f);
    t1 = t0 + frames.length(f);
    r0 = rows.begin(band);
    r1 = r0 + rows.length(band);
    temporal();
    spatial();
    pointwise();
  }

  // Asks for `count` rows of `bytes`.
  SFF_INLINE static void prefetch(const void* rows, int64_t count, int64_t next, int64_t bytes) {
    const char* row = static_cast<const char*>(rows);
    for (int64_t i = 0; i < count; ++i, row += next)
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
  }

  // A row of tiles of one panel: `columns` positions, whose results lie out_next apart.
  void products(const LayerTile<A>& layer, int count, int64_t columns, const A* shift, A* out, int64_t out_next) {
    const Parts tiles(columns, layer.rows);
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t m = tiles.length(i);
      layer.entry[m - 1](operands, count, shift, nullptr, 0, out, out_next);
      for (int o = 0; o < count; ++o) operands[o].rows += m * operands[o].lda;
      out += m * out_next;
    }
  }

  // Columns 0, step, 2 * step ... of an image row of x: as they lie, or converted into to[column][C].
  const A* x_row(int64_t t, int64_t h, int64_t step, int64_t columns, A* to) const {
    const T* from = row_at<T>(block.x, n, t, h * block.w);
    if constexpr (in_place) {
      return from;
    } else {
      for (int64_t i = 0; i < columns; ++i, from += step * block.x.stride_p)
        write_row<A, W>([&](int64_t c, int64_t count) { return load<W>(from + c, count); }, block.c, to + i * block.c,
                        block.c);
      return to;
    }
  }

  // a, for the rows of the image that the band's b sees; 0 for those above and below it.
  void temporal() {
    const int64_t first = r0 * block.stride - block.dilation, last = (r1 - 1) * block.stride + block.dilation;
    const int64_t lda = in_place ? block.x.stride_p : block.c;
    // Rows that are converted meet all panels at once, others one panel after the other, which then stays in cache.
    const int64_t panels = in_place ? 1 : inner.panels;
    for (int64_t i0 = 0; i0 < inner.panels; i0 += panels)
      for (int64_t t = t0; t < t1; ++t)
        for (int64_t h = first; h <= last; ++h) {
          A* out = a + (t - t0) * a_frame + (h - first) * a_row;
          if (h < 0 || h >= block.h) {
            __builtin_memset(out, 0, size_t(a_row) * sizeof(A));
            continue;
          }
          for (int64_t j = 0; j < block.kt; ++j) {
            const int64_t from = t + j - block.padding;
            const bool inside = from >= 0 && from < block.t;
            source[j] = inside ? x_row(from, h, 1, block.w, converted + j * block.w * block.c) : nullptr;
          }
          for (int64_t i = i0; i < i0 + panels; ++i) {
            const A* weight = static_cast<const A*>(plan.weight_a) + i * inner.panel * block.c * block.kt;
            int count = 0;
            for (int64_t j = 0; j < block.kt; ++j)
              if (source[j]) operands[count++] = {source[j], lda, weight + j * block.c * inner.panel, block.c};
            products(inner, count, block.w, static_cast<const A*>(plan.shift_a) + i * inner.panel,
                     out + block.dilation * a_column + i * inner.panel, a_column);
          }
        }
  }

  void spatial() {
    // Without dilation and padded channels the three columns of a tap's row lie side by side, as do their weights.
    const bool merged = block.dilation == 1 && block.j == a_column;
    const int64_t columns = merged ? 1 : 3, depth = merged ? 3 * block.j : block.j;
    for (int64_t i = 0; i < inner.panels; ++i) {
      const A* weight = static_cast<const A*>(plan.weight_b) + i * inner.panel * block.j * 9;
      for (int64_t t = t0; t < t1; ++t)
        for (int64_t r = r0; r < r1; ++r) {
          const A* image = a + (t - t0) * a_frame + (r - r0) * block.stride * a_row;
          int count = 0;
          for (int64_t kh = 0; kh < 3; ++kh)
            for (int64_t kw = 0; kw < columns; ++kw)
              operands[count++] = {image + block.dilation * (kh * a_row + kw * a_column), block.stride * a_column,
                                   weight + (kh * 3 + kw) * block.j * inner.panel, depth};
          products(inner, count, plan.w_out, static_cast<const A*>(plan.shift_b) + i * inner.panel,
                   b + (t - t0) * b_frame + (r - r0) * b_row + i * inner.panel, a_column);
        }
    }
  }

  void pointwise() {
    for (int64_t t = t0; t < t1; ++t)
      for (int64_t r = r0; r < r1; ++r) {
        const A* shortcut = nullptr;
        if (plan.weight_shortcut) shortcut = x_row(t, r * block.stride, block.stride, plan.w_out, converted);
        for (int64_t i = 0; i < outer.panels; ++i) pointwise(t, r, i, shortcut);
      }
  }

  void pointwise(int64_t t, int64_t r, int64_t i, const A* shortcut) {
    const int64_t k = i * outer.panel, channels = block.k - k < outer.panel ? block.k - k : outer.panel;
    const bool whole = in_place && channels == outer.panel;
    const A* shift = static_cast<const A*>(plan.shift_c) + k;
    int count = 0;
    operands[count++] = {b + (t - t0) * b_frame + (r - r0) * b_row, a_column,
                         static_cast<const A*>(plan.weight_c) + k * block.j, block.j};
    if (shortcut)
      operands[count++] = {shortcut, in_place ? block.x.stride_p * block.stride : block.c,
                           static_cast<const A*>(plan.weight_shortcut) + k * block.c, block.c};
    const T* residual = shortcut ? nullptr : row_at<T>(block.x, n, t, r * block.w) + k;
    T* y = row_at<T>(block.y, n, t, r * plan.w_out) + k;
    const Parts tiles(plan.w_out, outer.rows);
    for (int64_t p = 0; p < tiles.count; ++p) {
      const int64_t m = tiles.length(p);
      const auto kernel = outer.entry[m - 1];
      if (i == 0) {  // the rows below: lines to be written are not followed by hardware
        const int64_t next = block.y.stride_p * int64_t(sizeof(T)), from_next = block.x.stride_p * int64_t(sizeof(T));
        prefetch(y + plan.w_out * block.y.stride_p, m, next, block.k * int64_t(sizeof(T)));
        if (residual) prefetch(residual + plan.w_out * block.x.stride_p, m, from_next, block.k * int64_t(sizeof(T)));
      }
      if constexpr (in_place) {
        if (whole) kernel(operands, count, shift, residual, block.x.stride_p, y, block.y.stride_p);
      }
      if (!whole) {
        A *added = tile + outer.rows * outer.panel, *out = tile;
        if (residual) copy<W>(residual, block.x.stride_p, added, outer.panel, m, channels);
        kernel(operands, count, shift, residual ? added : nullptr, outer.panel, out, outer.panel);
        copy<W>(out, outer.panel, y, block.y.stride_p, m, channels);
      }
      for (int o = 0; o < count; ++o) operands[o].rows += m * operands[o].lda;
      if (residual) residual += m * block.x.stride_p;
      y += m * block.y.stride_p;
    }
  }

  template <int W, typename From, typename To>
  static void copy(const From* from, int64_t from_next, To* to, int64_t to_next, int64_t rows, int64_t channels) {
    for (int64_t i = 0; i < rows; ++i, from += from_next, to += to_next)
      for (int64_t c = 0; c < channels; c += W) store<W>(to + c, load<W>(from + c, channels - c), channels - c);
  }
};

}  // namespace slowfast_fast::cpu::SFF_ISA
