// Max pooling over H and W of rows of channels, as they are or with BatchNorm and ReLU on the way, and the backward of
// the latter. No indices are kept: the backward finds each window's maximum again.
#pragma once
#include "rowwise.h"

namespace slowfast_fast::cpu::SFF_ISA {

// Whether b is to replace a as the maximum: the first one stays, and the last NaN wins, as in torch.
template <typename V>
SFF_INLINE auto replaces(const V& b, const V& a) {
  return (b > a) | (b != b);
}

// What of a window of the pool lies inside of the image. `top` and `left` may not.
struct PoolWindow {
  int64_t top, left, h0, h1, w0, w1;
};

SFF_INLINE PoolWindow window_of(const MaxPool& pool, int64_t h, int64_t w) {
  const auto within = [](int64_t at, int64_t size) { return at < 0 ? 0 : at < size ? at : size; };
  const int64_t top = h * pool.stride - pool.padding, left = w * pool.stride - pool.padding;
  return {top,
          left,
          within(top, pool.h_in),
          within(top + pool.kernel, pool.h_in),
          within(left, pool.w_in),
          within(left + pool.kernel, pool.w_in)};
}

// Calls body(value, place) for vector c of every row inside of the window, row by row; `place` counts outside ones too.
template <typename T, int W, typename Body>
SFF_INLINE void for_window(const MaxPool& pool, const PoolWindow& window, int64_t n, int64_t t, int64_t c, Body body) {
  const int64_t count = pool.c - c;
  for (int64_t i = window.h0; i < window.h1; ++i) {
    const T* x = row_at<T>(pool.x, n, t, i * pool.w_in + window.w0) + c;
    int64_t place = (i - window.top) * pool.kernel + window.w0 - window.left;
    for (int64_t j = window.w0; j < window.w1; ++j, ++place, x += pool.x.stride_p) body(load<W>(x, count), place);
  }
}

// BatchNorm of the vector of channels at c.
template <typename A, int W>
struct PoolNorm {
  using V = Vec<A, W>;
  V mean, factor, beta;

  SFF_INLINE PoolNorm(const PoolPlan& plan, int64_t c)
      : mean(load<W>(static_cast<const A*>(plan.mean) + c)),
        factor(load<W>(static_cast<const A*>(plan.factor) + c)),
        beta(load<W>(static_cast<const A*>(plan.beta) + c)) {}

  SFF_INLINE V operator()(const V& centred) const { return centred * factor + beta; }
};

// Rows of an image, one task each: calls body(n, t, h).
template <typename Body>
SFF_INLINE void for_image_rows(int64_t frames, int64_t height, int64_t begin, int64_t end, Body body) {
  for (int64_t task = begin; task < end; ++task)
    body(task, task / height / frames, task / height % frames, task % height);
}

template <typename T, int W>
void max_pool_rows(const PoolPlan& plan, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using V = Vec<A, W>;
  const MaxPool& pool = plan.pool;
  for_image_rows(pool.t, pool.h_out, begin, end, [&](int64_t, int64_t n, int64_t t, int64_t h) {
    for (int64_t w = 0; w < pool.w_out; ++w) {
      const PoolWindow window = window_of(pool, h, w);
      T* y = row_at<T>(pool.y, n, t, h * pool.w_out + w);
      for (int64_t c = 0; c < pool.c; c += W) {
        V most = V{} - A(__builtin_inf());
        const auto take = [&](const V& v) { most = replaces(v, most) ? v : most; };
        if (plan.factor) {
          const PoolNorm<A, W> norm(plan, c);
          for_window<T, W>(pool, window, n, t, c, [&](const V& v, int64_t) { take(norm(v - norm.mean)); });
          if (plan.relu) most = relu(most);
        } else {
          for_window<T, W>(pool, window, n, t, c, [&](const V& v, int64_t) { take(v); });
        }
        store<W>(y + c, most, pool.c - c);
      }
    }
  });
}

template <typename T, int W>
void pool_sum_rows(const PoolSumsPlan& plan, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using V = Vec<A, W>;
  using Places = decltype(V{} < V{});  // integers as wide as the values
  using Bytes = Vec<uint8_t, W>;
  const MaxPool& pool = plan.forward.pool;
  for_image_rows(pool.t, pool.h_out, begin, end, [&](int64_t task, int64_t n, int64_t t, int64_t h) {
    double* sum = plan.sums + task * 2 * pool.c;
    for (int64_t i = 0; i < 2 * pool.c; ++i) sum[i] = 0;
    for (int64_t first = 0; first < pool.w_out; first += summed_rows) {
      const int64_t stop = first + summed_rows < pool.w_out ? first + summed_rows : pool.w_out;
      for (int64_t c = 0; c < pool.c; c += W) {
        const int64_t count = pool.c - c, lanes = count < W ? count : W;
        const PoolNorm<A, W> norm(plan.forward, c);
        V total{}, product{};
        for (int64_t w = first; w < stop; ++w) {
          V most = V{} - A(__builtin_inf()), centred{};
          Places where{};
          for_window<T, W>(pool, window_of(pool, h, w), n, t, c, [&](const V& v, int64_t place) {
            const V d = v - norm.mean, z = norm(d);
            const auto better = replaces(z, most);
            most = better ? z : most;
            centred = better ? d : centred;
            where = better ? Places{} + int(place) : where;
          });
          V g = load<W>(row_at<T>(plan.grad, n, t, h * pool.w_out + w) + c, count);
          if (plan.forward.relu) {
            const auto stopped = stored<T, W>(most) <= V{};  // as the forward stored it
            g = stopped ? V{} : g;
            where = stopped ? Places{} + PoolSumsPlan::none : where;
          }
          total += g;
          product += g * centred;
          const Bytes bytes = __builtin_convertvector(where, Bytes);
          __builtin_memcpy(plan.place + (task * pool.w_out + w) * pool.c + c, &bytes, size_t(lanes));
        }
        for (int64_t l = 0; l < lanes; ++l) {
          sum[c + l] += total[l];
          sum[pool.c + c + l] += product[l];
        }
      }
    }
  });
}

template <typename T, int W>
void pool_gradient_rows(const PoolGradientPlan& plan, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using V = Vec<A, W>;
  using Places = decltype(V{} < V{});
  using Bytes = Vec<uint8_t, W>;
  const MaxPool& pool = plan.forward.pool;
  // The windows that see position `at` of a dimension with `windows` of them.
  const auto from = [&](int64_t at) {
    const int64_t past = at + pool.padding - pool.kernel;
    return past < 0 ? 0 : past / pool.stride + 1;
  };
  const auto to = [&](int64_t at, int64_t windows) {
    const int64_t last = (at + pool.padding) / pool.stride + 1;
    return last < windows ? last : windows;
  };
  for_image_rows(pool.t, pool.h_in, begin, end, [&](int64_t, int64_t n, int64_t t, int64_t h) {
    const int64_t i0 = from(h), i1 = to(h, pool.h_out);
    for (int64_t w = 0; w < pool.w_in; ++w) {
      const int64_t j0 = from(w), j1 = to(w, pool.w_out), p = h * pool.w_in + w;
      const T* x = row_at<T>(pool.x, n, t, p);
      T* dx = row_at<T>(plan.dx, n, t, p);
      for (int64_t c = 0; c < pool.c; c += W) {
        const int64_t count = pool.c - c;
        V g{};
        for (int64_t i = i0; i < i1; ++i)
          for (int64_t j = j0; j < j1; ++j) {
            const int64_t q = i * pool.w_out + j;
            const int64_t place =
                (h + pool.padding - i * pool.stride) * pool.kernel + w + pool.padding - j * pool.stride;
            const Bytes bytes =
                load_raw<Bytes>(plan.place + ((n * pool.t + t) * pool.h_out * pool.w_out + q) * pool.c + c);
            const Places where = __builtin_convertvector(bytes, Places);
            g += where == Places{} + int(place) ? load<W>(row_at<T>(plan.grad, n, t, q) + c, count) : V{};
          }
        const auto vector = [&](const void* v) { return load<W>(static_cast<const A*>(v) + c); };
        const V d = load<W>(x + c, count) - vector(plan.forward.mean);
        store<W>(dx + c, g * vector(plan.forward.factor) + (d * vector(plan.slope) + vector(plan.offset)), count);
      }
    }
  });
}

}  // namespace slowfast_fast::cpu::SFF_ISA
