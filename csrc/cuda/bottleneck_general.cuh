// A bottleneck block for any channels, layout and dtype: every thread computes results by itself, one after another,
// with a and b of its item in shared memory in the accumulation type. Exact, and slow.
#pragma once
#include "bottleneck_plan.cuh"

namespace slowfast_fast::cuda::bottleneck {

// Summed kRun products at a time, which bounds the rounding error of long sums.
template <class Acc, class Product>
__device__ Acc sum_of(int count, const Product& product) {
  constexpr int kRun = 16;
  Acc sum = 0;
#pragma unroll 1
  for (int begin = 0; begin < count; begin += kRun) {
    Acc part = 0;
#pragma unroll 1
    for (int i = begin; i < begin + kRun && i < count; ++i) part += product(i);
    sum += part;
  }
  return sum;
}

template <class Acc>
size_t general_bytes(const Plan& plan) {
  const Band& band = plan.band;
  return size_t(plan.block.j) * band.frames * (plan.a_rows * plan.a_columns + band.rows * band.columns) * sizeof(Acc);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) bottleneck_general_kernel(Plan plan) {
  using Acc = Accumulator<T>;
  const Bottleneck& s = plan.block;
  const Item item(plan, blockIdx.x);
  const Reach h(item.row, item.rows, int(s.h), s), w(item.column, item.columns, int(s.w), s);
  const int c = int(s.c), j = int(s.j), k = int(s.k), kt = int(s.kt), outputs = item.frames * item.rows * item.columns;
  const auto value = [](const void* of, int64_t i) { return Acc(static_cast<const T*>(of)[i]); };
  Acc* a = &shared_memory<Acc>();
  Acc* b = a + int64_t(plan.band.frames) * plan.a_rows * plan.a_columns * j;

  for (int i = threadIdx.x; i < item.frames * plan.a_rows * plan.a_columns * j; i += kThreads) {
    const Place at(i / j, plan.a_rows, plan.a_columns);
    const int channel = i % j;
    if (!h.holds(at.row) || !w.holds(at.column)) {
      a[i] = 0;
      continue;
    }
    const int64_t p = int64_t(h.first + at.row) * s.w + w.first + at.column, first = item.t + at.frame - s.padding;
    const T* x = row_at<T>(s.x, {item.n, 0, p});
    const Acc sum = sum_of<Acc>(c * kt, [&](int d) {
      const int64_t t = first + d % kt;
      return t < 0 || t >= s.t ? Acc(0)
                               : Acc(x[t * s.x.stride_t + d / kt]) * value(s.weight_a, int64_t(channel) * c * kt + d);
    });
    a[i] = relu(sum + static_cast<const Acc*>(s.shift_a)[channel]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < outputs * j; i += kThreads) {
    const Place at(i / j, item.rows, item.columns);
    const int channel = i % j, stride = int(s.stride), dilation = int(s.dilation);
    const Acc sum = sum_of<Acc>(9 * j, [&](int d) {
      const int tap = d / j, in = d % j;
      const int row = at.row * stride + tap / 3 * dilation, column = at.column * stride + tap % 3 * dilation;
      return a[((at.frame * plan.a_rows + row) * plan.a_columns + column) * j + in] *
             value(s.weight_b, (channel * j + in) * 9 + tap);
    });
    b[i] = relu(sum + static_cast<const Acc*>(s.shift_b)[channel]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < outputs * k; i += kThreads) {
    const int output = i / k, channel = i % k;
    const Place at(output, item.rows, item.columns);
    const T* x = row_at<T>(s.x, item.input(plan, at.frame, at.row, at.column));
    Acc sum = sum_of<Acc>(j, [&](int d) { return b[output * j + d] * value(s.weight_c, int64_t(channel) * j + d); });
    sum += static_cast<const Acc*>(s.shift_c)[channel] + channel_or(s.shift_shortcut, channel, Acc(0));
    if (!s.weight_shortcut) sum += Acc(x[channel]);
    else sum += sum_of<Acc>(c, [&](int d) { return Acc(x[d]) * value(s.weight_shortcut, int64_t(channel) * c + d); });
    row_at<T>(s.y, item.output(plan, at.frame, at.row, at.column))[channel] = T(relu(sum));
  }
}

}  // namespace slowfast_fast::cuda::bottleneck
