// The first convolution of a pathway: few channels, windows in T, H and W. A frame is copied band by band into rows of
// pixels whose channels lie side by side, zeros around it; a window's row is then kw * C adjacent values, the depth of
// a register tile of neighbouring positions.
#pragma once
#include "conv.h"

namespace slowfast_fast::cpu::SFF_ISA {

// Output rows [h0, h1) of clip n, and the frames that they read.
template <typename T>
struct StemBand {
  using A = Acc<T>;
  const StemPlan& plan;
  const StemShape& s;
  int64_t n, h0, h1;

  // Of a band as long as any.
  static int64_t rows(const StemPlan& p) { return (p.band - 1) * p.shape.stride[1] + p.shape.kernel[1]; }
  static int64_t bytes(const StemPlan& p) { return align_up(rows(p) * p.row_length() * int64_t(sizeof(A))); }

  StemBand(const StemPlan& p, int64_t unit) : plan(p), s(p.shape) {
    const int64_t bands = ceil_div(s.out[1], p.band);
    n = unit / bands;
    h0 = unit % bands * p.band;
    h1 = h0 + p.band < s.out[1] ? h0 + p.band : s.out[1];
  }

  void read(int64_t frame, A* to) const {
    const int64_t length = plan.row_length(), pixels = length / s.c;
    const int64_t count = (h1 - h0 - 1) * s.stride[1] + s.kernel[1], top = h0 * s.stride[1] - s.padding[1];
    const int64_t left = s.padding[2] < pixels ? s.padding[2] : pixels;
    const int64_t inside = pixels - left < s.in[2] ? pixels - left : s.in[2];
    for (int64_t i = 0; i < count; ++i, to += length) {
      const int64_t h = top + i;
      const bool outside = h < 0 || h >= s.in[1];
      clear(to, outside ? length : left * s.c);
      if (outside) continue;
      const T* from = static_cast<const T*>(plan.x.data) + n * plan.x.n + frame * plan.x.t + h * plan.x.h;
      copy_pixels(from, inside, to + left * s.c);
      clear(to + (left + inside) * s.c, (pixels - left - inside) * s.c);
    }
  }

 private:
  static void clear(A* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = 0;
  }
  void copy_pixels(const T* from, int64_t count, A* __restrict__ to) const {
    const StridedClips& x = plan.x;
    if (x.c == 1 && x.w == s.c) {
      for (int64_t i = 0; i < count * s.c; ++i) to[i] = widen(from[i]);
    } else if (s.c == 3 && x.w == 1) {  // planes of three colours, which a compiler interleaves in registers
      const T *red = from, *green = from + x.c, *blue = from + 2 * x.c;
      for (int64_t i = 0; i < count; ++i) {
        to[3 * i] = widen(red[i]);
        to[3 * i + 1] = widen(green[i]);
        to[3 * i + 2] = widen(blue[i]);
      }
    } else {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < s.c; ++c) to[i * s.c + c] = widen(from[i * x.w + c * x.c]);
    }
  }
};

// Tasks: bands. The last kt frames stay in a ring.
template <typename T, typename Tl>
struct StemTask {
  using A = Acc<T>;
  using V = typename Tl::V;
  static constexpr int W = Tl::W, panel = Tl::panel;

  const StemPlan& plan;
  const StemShape& s;
  A* ring;         // [frame % kt][row][pixel][channel]
  int64_t* holds;  // [frame % kt]: the frame

  static int64_t ring_bytes(const StemPlan& p) { return p.shape.kernel[0] * StemBand<T>::bytes(p); }
  static int64_t scratch(const StemPlan& p) { return ring_bytes(p) + p.shape.kernel[0] * int64_t(sizeof(int64_t)); }

  StemTask(const StemPlan& p, void* memory)
      : plan(p),
        s(p.shape),
        ring(static_cast<A*>(memory)),
        holds(reinterpret_cast<int64_t*>(static_cast<char*>(memory) + ring_bytes(p))) {}

  void run(int64_t task) {
    const StemBand<T> band(plan, task);
    for (int64_t j = 0; j < s.kernel[0]; ++j) holds[j] = -1;
    for (int64_t t = 0; t < s.out[0]; ++t) {
      const int64_t first = t * s.stride[0] - s.padding[0];
      for (int64_t f = first < 0 ? 0 : first; f < first + s.kernel[0] && f < s.in[0]; ++f)
        if (holds[f % s.kernel[0]] != f) band.read(holds[f % s.kernel[0]] = f, at(f));
      for (int64_t h = band.h0; h < band.h1; ++h)
        for (int64_t k0 = 0; k0 < s.k; k0 += panel) run_row(band, first, t, h, k0);
    }
  }

 private:
  A* at(int64_t frame) const { return ring + frame % s.kernel[0] * (StemBand<T>::bytes(plan) / int64_t(sizeof(A))); }

  void run_row(const StemBand<T>& band, int64_t first, int64_t t, int64_t h, int64_t k0) const {
    const int64_t depth = s.kernel[2] * s.c, step = s.stride[2] * s.c, length = plan.row_length();
    const A* weights = static_cast<const A*>(plan.weight) + k0 * s.kernel[0] * s.kernel[1] * depth;
    const Parts tiles(s.out[2], Tl::MR);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t w0 = tiles.begin(tile), m = tiles.length(tile);
      // Lines of the result arrive while the products run.
      for (int64_t i = 0; i < m; ++i) __builtin_prefetch(row_at<T>(plan.y, band.n, t, h * s.out[2] + w0 + i) + k0, 1);
      const A *x[max_taps], *weight[max_taps];
      A sums[Tl::MR * panel];
      int taps = 0;
      bool begun = false;
      const auto flush = [&] {
        table<Tl>.products[m - 1](taps, x, weight, step, depth, sums, begun);
        begun = true;
        taps = 0;
      };
      for (int64_t j = 0; j < s.kernel[0]; ++j) {
        const int64_t f = first + j;
        if (f < 0 || f >= s.in[0]) continue;
        for (int64_t i = 0; i < s.kernel[1]; ++i) {
          x[taps] = at(f) + ((h - band.h0) * s.stride[1] + i) * length + w0 * step;
          weight[taps] = weights + (j * s.kernel[1] + i) * depth * panel;
          if (++taps == max_taps) flush();
        }
      }
      if (taps || !begun) flush();
      finish(sums, band.n, t, h * s.out[2] + w0, m, k0);
    }
  }

  void finish(const A* sums, int64_t n, int64_t t, int64_t p, int64_t m, int64_t k0) const {
    for (int64_t i = 0; i < m; ++i, sums += panel) {
      T* y = row_at<T>(plan.y, n, t, p + i) + k0;
      for (int64_t c = 0; c < panel && k0 + c < s.k; c += W) {
        V v = load_raw<V>(sums + c);
        if (plan.shift) v += load_raw<V>(static_cast<const A*>(plan.shift) + k0 + c);
        store<W>(y + c, plan.relu ? relu(v) : v, s.k - k0 - c);
      }
    }
  }
};

// partial[chunk][panel][tap in T][tap in H][tap in W][c][channel of the panel]: the chunk's bands, frame by frame, each
// met by the gradients of the frames that saw it.
template <typename T, typename Tl>
struct StemWgradTask {
  using A = Acc<T>;
  using V = typename Tl::V;
  static constexpr int W = Tl::W, panel = Tl::panel;
  static constexpr int most_rows = 64;

  const StemPlan& plan;
  const StemShape& s;
  A* frame;     // a band
  A* gradient;  // [position of the band][k, to whole panels]

  static int64_t padded(const StemPlan& p) { return ceil_div(p.shape.k, panel) * panel; }
  static int64_t scratch(const StemPlan& p) {
    return StemBand<T>::bytes(p) + p.band * p.shape.out[2] * padded(p) * int64_t(sizeof(A));
  }

  StemWgradTask(const StemPlan& p, void* memory)
      : plan(p),
        s(p.shape),
        frame(static_cast<A*>(memory)),
        gradient(reinterpret_cast<A*>(static_cast<char*>(memory) + StemBand<T>::bytes(p))) {}

  void run(int64_t chunk) {
    const int64_t k = padded(plan), taps = s.kernel[0] * s.kernel[1] * s.kernel[2] * s.c;
    double* sums = plan.partial + chunk * taps * k;
    for (int64_t i = 0; i < taps * k; ++i) sums[i] = 0;
    const Parts units(s.n * ceil_div(s.out[1], plan.band), plan.chunk);
    for (int64_t u = 0; u < units.length(chunk); ++u) {
      const StemBand<T> band(plan, units.begin(chunk) + u);
      for (int64_t f = 0; f < s.in[0]; ++f) {
        bool read = false;
        for (int64_t j = 0; j < s.kernel[0]; ++j) {
          const int64_t t = (f + s.padding[0] - j) / s.stride[0];
          if (t * s.stride[0] + j - s.padding[0] != f || t < 0 || t >= s.out[0]) continue;
          if (!read) band.read(f, frame);
          read = true;
          const int64_t rows = band.h1 - band.h0;
          read_rows<T, W>(plan.gradient, band.n, t, band.h0 * s.out[2], rows * s.out[2], 0, s.k, gradient, k);
          for (int64_t k0 = 0; k0 < k; k0 += panel)
            for (int64_t i = 0; i < s.kernel[1]; ++i)
              add_products(rows, i, k0, sums + k0 * taps + (j * s.kernel[1] + i) * s.kernel[2] * s.c * panel);
        }
      }
    }
  }

 private:
  void add_products(int64_t rows, int64_t tap, int64_t k0, double* sums) const {
    const int64_t length = plan.row_length(), k = padded(plan), step = s.stride[2] * s.c;
    const Parts tiles(s.kernel[2] * s.c, Tl::MR);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t c0 = tiles.begin(tile), m = tiles.length(tile);
      const A *x[most_rows], *g[most_rows];
      A products[Tl::MR * panel];
      for (int64_t row = 0; row < rows; ++row) {
        x[row] = frame + (row * s.stride[1] + tap) * length + c0;
        g[row] = gradient + row * s.out[2] * k + k0;
      }
      table<Tl>.outer_products[m - 1](int(rows), x, g, step, k, s.out[2], products);
      for (int64_t i = 0; i < m * panel; ++i) sums[c0 * panel + i] += double(products[i]);
    }
  }
};

}  // namespace slowfast_fast::cpu::SFF_ISA
