// Reading the left operand of a product: conversion to the accumulation type, ReLU mask and BatchNorm backward on the
// way.
#pragma once
#include "../plan.h"
#include "vec.h"

namespace slowfast_fast::cpu::SFF_ISA {

template <typename T, typename Pointer>
SFF_INLINE auto* row_at(const RowsOf<Pointer>& rows, int64_t n, int64_t t, int64_t p) {
  const int64_t offset = n * rows.stride_n + t * rows.stride_t + p * rows.stride_p;
  if constexpr (sizeof(Pointer) && __is_same(Pointer, void*)) return static_cast<T*>(rows.data) + offset;
  else return rows.data ? static_cast<const T*>(rows.data) + offset : nullptr;
}

// One row of a Source; vectors of W channels starting at c, of which `count` exist.
template <typename T, int W>
struct SourceRow {
  using A = Acc<T>;
  using V = Vec<A, W>;
  // Copies: what is stored on the way could alias a Source in memory.
  const T *value, *y, *raw, *residual;
  const A *mean, *factor, *beta, *slope, *offset;
  bool relu;

  SFF_INLINE SourceRow(const Source& s, int64_t n, int64_t t, int64_t p)
      : value(row_at<T>(s.rows, n, t, p)),
        y(row_at<T>(s.y, n, t, p)),
        raw(row_at<T>(s.raw, n, t, p)),
        residual(row_at<T>(s.residual, n, t, p)),
        mean(static_cast<const A*>(s.mean)),
        factor(static_cast<const A*>(s.factor)),
        beta(static_cast<const A*>(s.beta)),
        slope(static_cast<const A*>(s.slope)),
        offset(static_cast<const A*>(s.offset)),
        relu(s.relu) {}

  SFF_INLINE V centred(int64_t c, int64_t count) const { return load<W>(raw + c, count) - load<W>(mean + c); }

  // The gradient behind the ReLU. A NaN passes the mask, as in torch's threshold_backward.
  SFF_INLINE V masked(int64_t c, int64_t count) const {
    V v = load<W>(value + c, count);
    if (y) v = load<W>(y + c, count) <= V{} ? V{} : v;
    if (raw && relu) {
      V z = centred(c, count) * load<W>(factor + c) + load<W>(beta + c);
      if (residual) z += load<W>(residual + c, count);
      v = stored<T, W>(z) <= V{} ? V{} : v;  // as the forward stored it
    }
    return v;
  }

  SFF_INLINE V operator()(int64_t c, int64_t count) const {
    V v = masked(c, count);
    if (raw) v = v * load<W>(factor + c) + (centred(c, count) * load<W>(slope + c) + load<W>(offset + c));
    return v;
  }
};

// The source frames [from, to) that destination frames [t0, t1) sum over; from = frames, to = 0 when there are none.
SFF_INLINE void source_range(const TapTable& taps, int64_t frames, int64_t t0, int64_t t1, int64_t* from, int64_t* to) {
  *from = frames;
  *to = 0;
  for (int64_t e = taps.first[t0]; e < taps.first[t1]; ++e) {
    if (taps.frame[e] < *from) *from = taps.frame[e];
    if (taps.frame[e] + 1 > *to) *to = taps.frame[e] + 1;
  }
}

// Whether products, summed in A, can read the tensor itself.
template <typename T, typename A = Acc<T>>
SFF_INLINE bool is_direct(const Source& s) {
  return __is_same(T, A) && !s.y.data && !s.raw.data;
}

// One row of a block: value(c, count) for `depth` channels into to[c]; up to ld, 0 follows.
template <typename A, int W, typename Value>
SFF_INLINE void write_row(Value value, int64_t depth, A* to, int64_t ld) {
  int64_t c = 0;
  for (; c + W <= depth; c += W) store<W>(to + c, value(c, W));
  if (c < depth) {
    Vec<A, W> v = value(c, depth - c);
    for (int l = 0; l < W; ++l) v[l] = l < depth - c ? v[l] : 0;
    store<W>(to + c, v, ld - c);
    c += W;
  }
  for (; c < ld; c += W) store<W>(to + c, Vec<A, W>{}, ld - c);
}

// Channels [c0, c0 + depth) of `rows` rows of a frame, into to[row * ld + c]; up to ld, 0 follows.
template <typename T, int W, typename A>
SFF_INLINE void read_rows(const Source& s, int64_t n, int64_t t, int64_t p0, int64_t rows, int64_t c0, int64_t depth,
                          A* to, int64_t ld) {
  const auto widened = [](const Vec<Acc<T>, W>& v) { return __builtin_convertvector(v, Vec<A, W>); };
  if (!s.y.data && !s.raw.data) {
    const T* from = row_at<T>(s.rows, n, t, p0) + c0;
    for (int64_t i = 0; i < rows; ++i, to += ld, from += s.rows.stride_p)
      write_row<A, W>([&](int64_t c, int64_t count) { return widened(load<W>(from + c, count)); }, depth, to, ld);
    return;
  }
  for (int64_t i = 0; i < rows; ++i, to += ld) {
    const SourceRow<T, W> row(s, n, t, p0 + i);
    write_row<A, W>([&](int64_t c, int64_t count) { return widened(row(c0 + c, count)); }, depth, to, ld);
  }
}

}  // namespace slowfast_fast::cpu::SFF_ISA
