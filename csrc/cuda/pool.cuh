// Max pooling over H and W, a thread for every 16 bytes of a result's row where rows allow it, else for every element.
#pragma once
#include "elementwise.cuh"
#include "pack.cuh"

namespace slowfast_fast::cuda {

// The larger one; a NaN of either is the result, as in torch.
template <class Acc>
__device__ Acc larger(Acc a, Acc b) {
  return b > a || b != b ? b : a;
}

// kWidth adjacent channels a thread, which divide the channels; adjacent threads have adjacent channels.
template <class T, int kWidth>
__global__ void __launch_bounds__(kElementThreads) max_pool_kernel(MaxPool args) {
  using Acc = Accumulator<T>;
  const int64_t groups = args.c / kWidth, elements = args.n * args.t * args.h_out * args.w_out * groups;
  for (int64_t i = first_element(); i < elements; i += element_step()) {
    const Position at = position_of(i / groups, args.t, args.h_out * args.w_out);
    const int64_t c = i % groups * kWidth;
    const int64_t h = at.p / args.w_out * args.stride - args.padding,
                  w = at.p % args.w_out * args.stride - args.padding;
    const int64_t h0 = h < 0 ? 0 : h, h1 = h + args.kernel < args.h_in ? h + args.kernel : args.h_in;
    const int64_t w0 = w < 0 ? 0 : w, w1 = w + args.kernel < args.w_in ? w + args.kernel : args.w_in;
    T most[kWidth], value[kWidth];
    const auto load = [&](T(&to)[kWidth], int64_t p) {
      const T* from = row_at<T>(args.x, {at.n, at.t, p}) + c;
      if constexpr (kWidth == 1) to[0] = *from;
      else load_values(to, from);
    };
    load(most, h0 * args.w_in + w0);
    for (int64_t y = h0; y < h1; ++y)
      for (int64_t x = w0; x < w1; ++x) {
        load(value, y * args.w_in + x);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) most[e] = T(larger(Acc(most[e]), Acc(value[e])));
      }
    T* to = row_at<T>(args.y, at) + c;
    if constexpr (kWidth == 1) *to = most[0];
    else store_values(most, to);
  }
}

template <class T, class Queue>
void max_pool_as(Queue& queue, const MaxPool& args) {
  constexpr int kWidth = Pack<T>::kSize;
  const int64_t elements = args.n * args.t * args.h_out * args.w_out * args.c;
  if (elements == 0) return;
  if (why_not_packs<T>(args.c, args.x, args.y)) queue.launch(max_pool_kernel<T, 1>, element_launch(elements), args);
  else queue.launch(max_pool_kernel<T, kWidth>, element_launch(elements / kWidth), args);
}

}  // namespace slowfast_fast::cuda
