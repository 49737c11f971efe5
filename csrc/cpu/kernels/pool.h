// Max pooling over H and W of rows of channels, without the indices that a backward would want.
#pragma once
#include "source.h"

namespace slowfast_fast::cpu::SFF_ISA {

// The larger one; a NaN of either is the result, as in torch.
template <typename V>
SFF_INLINE V larger(const V& a, const V& b) {
  const V v = b > a ? b : a;
  return b != b ? b : v;
}

// Tasks: rows of the result's images.
template <typename T, int W>
void max_pool_rows(const MaxPool& args, int64_t begin, int64_t end) {
  using V = Vec<Acc<T>, W>;
  const auto clip = [](int64_t first, int64_t kernel, int64_t size, int64_t* from, int64_t* to) {
    *from = first < 0 ? 0 : first;
    *to = first + kernel < size ? first + kernel : size;
  };
  for (int64_t task = begin; task < end; ++task) {
    const int64_t frame = task / args.h_out, n = frame / args.t, t = frame % args.t, h = task % args.h_out;
    int64_t h0, h1, w0, w1;
    clip(h * args.stride - args.padding, args.kernel, args.h_in, &h0, &h1);
    for (int64_t w = 0; w < args.w_out; ++w) {
      clip(w * args.stride - args.padding, args.kernel, args.w_in, &w0, &w1);
      T* y = row_at<T>(args.y, n, t, h * args.w_out + w);
      for (int64_t c = 0; c < args.c; c += W) {
        const int64_t count = args.c - c;
        V most = load<W>(row_at<T>(args.x, n, t, h0 * args.w_in + w0) + c, count);
        for (int64_t i = h0; i < h1; ++i) {
          const T* x = row_at<T>(args.x, n, t, i * args.w_in + w0) + c;
          for (int64_t j = w0; j < w1; ++j, x += args.x.stride_p) most = larger(most, load<W>(x, count));
        }
        store<W>(y + c, most, count);
      }
    }
  }
}

}  // namespace slowfast_fast::cpu::SFF_ISA
