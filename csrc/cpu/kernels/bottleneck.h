// A whole bottleneck block at a time: a thread keeps the inner activations of a band of rows in its cache, and stores
// the result once.
#pragma once
#include "layer.h"
#include "source.h"

namespace slowfast_fast::cpu::SFF_ISA {

template <typename T>
struct BottleneckTask {
  using A = Acc<T>;
  // Products read x itself, or rows of it that are converted first.
  static constexpr bool in_place = sizeof(T) == sizeof(A);
  static constexpr int W = sizeof(A) == 8 ? Wide64::W : Narrow32::W;
  static constexpr int64_t tiled_columns = 28;  // five tiles of 6 or 5 on AVX2
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
      const LayerTile<A> of_a(p.block.j), of_y(p.block.k);
      const int64_t a_tile = of_a.rows * of_a.panel, y_tile = 2 * of_y.rows * of_y.panel;
      tile = align(a_tile > y_tile ? a_tile : y_tile);
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

  // One panel of a or b for `rows` image rows of `columns` positions. Operands run on from row to row; results go to
  // out[row * out_row + column * a_column].
  void products(int count, int64_t rows, int64_t columns, const A* shift, A* out, int64_t out_row) {
    const Parts tiles(rows * columns, inner.rows);
    int64_t row = 0, column = 0;
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t m = tiles.length(i);
      const auto kernel = inner.entry[m - 1];
      if (column + m <= columns) {
        kernel(operands, count, shift, nullptr, 0, out + row * out_row + column * a_column, a_column);
        column += m;
      } else {
        kernel(operands, count, shift, nullptr, 0, tile, inner.panel);
        for (int64_t done = 0; done < m;) {
          if (column == columns) {
            ++row;
            column = 0;
          }
          const int64_t part = m - done < columns - column ? m - done : columns - column;
          copy<W>(tile + done * inner.panel, inner.panel, out + row * out_row + column * a_column, a_column, part,
                  inner.panel);
          done += part;
          column += part;
        }
      }
      if (column == columns) {
        ++row;
        column = 0;
      }
      for (int o = 0; o < count; ++o) operands[o].rows += m * operands[o].lda;
    }
  }

  // Image rows that tiles run across, so that narrow images have full ones too.
  static int64_t joined(int64_t columns) { return columns < tiled_columns ? tiled_columns / columns : 1; }

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
    const int64_t first = r0 * block.stride - block.dilation, end = (r1 - 1) * block.stride + block.dilation + 1;
    const int64_t top = first > 0 ? first : 0, bottom = end < block.h ? end : block.h;
    for (int64_t t = t0; t < t1; ++t) {
      A* frame = a + (t - t0) * a_frame;
      __builtin_memset(frame, 0, size_t((top - first) * a_row) * sizeof(A));
      __builtin_memset(frame + (bottom - first) * a_row, 0, size_t((end - bottom) * a_row) * sizeof(A));
    }
    const int64_t lda = in_place ? block.x.stride_p : block.c;
    // Rows that are converted meet all panels at once, others one panel after the other, which then stays in cache.
    const int64_t panels = in_place ? 1 : inner.panels;
    for (int64_t i0 = 0; i0 < inner.panels; i0 += panels)
      for (int64_t t = t0; t < t1; ++t)
        for (int64_t h = top, rows; h < bottom; h += rows) {
          rows = in_place ? joined(block.w) : 1;
          if (rows > bottom - h) rows = bottom - h;
          A* out = a + (t - t0) * a_frame + (h - first) * a_row + block.dilation * a_column;
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
            products(count, rows, block.w, static_cast<const A*>(plan.shift_a) + i * inner.panel, out + i * inner.panel,
                     a_row);
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
          products(count, 1, plan.w_out, static_cast<const A*>(plan.shift_b) + i * inner.panel,
                   b + (t - t0) * b_frame + (r - r0) * b_row + i * inner.panel, b_row);
        }
    }
  }

  void pointwise() {
    for (int64_t t = t0; t < t1; ++t)
      for (int64_t r = r0, rows; r < r1; r += rows) {
        rows = plan.weight_shortcut ? 1 : joined(plan.w_out);
        if (rows > r1 - r) rows = r1 - r;
        const A* shortcut = nullptr;
        if (plan.weight_shortcut) shortcut = x_row(t, r * block.stride, block.stride, plan.w_out, converted);
        for (int64_t i = 0; i < outer.panels; ++i) pointwise(t, r, rows * plan.w_out, i, shortcut);
      }
  }

  // Panel i of the result for `columns` positions from the beginning of row r.
  void pointwise(int64_t t, int64_t r, int64_t columns, int64_t i, const A* shortcut) {
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
    const Parts tiles(columns, outer.rows);
    for (int64_t p = 0; p < tiles.count; ++p) {
      const int64_t m = tiles.length(p);
      const auto kernel = outer.entry[m - 1];
      if (i == 0) {  // the rows below: lines to be written are not followed by hardware
        const int64_t next = block.y.stride_p * int64_t(sizeof(T)), from_next = block.x.stride_p * int64_t(sizeof(T));
        prefetch(y + columns * block.y.stride_p, m, next, block.k * int64_t(sizeof(T)));
        if (residual) prefetch(residual + columns * block.x.stride_p, m, from_next, block.k * int64_t(sizeof(T)));
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
