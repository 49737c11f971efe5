// Passes over rows, the packing of weights and the finish of wgrad.
#pragma once
#include "micro.h"
#include "source.h"

namespace slowfast_fast::cpu::SFF_ISA {

// Calls body(n, t, p, rows) for the row blocks [begin, end).
template <typename Plan, typename Body>
SFF_INLINE void for_row_blocks(const Plan& plan, int64_t begin, int64_t end, Body body) {
  const int64_t blocks = ceil_div(plan.p, row_block);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t frame = task / blocks, p = task % blocks * row_block;
    body(task, frame / plan.t, frame % plan.t, p, plan.p - p < row_block ? plan.p - p : row_block);
  }
}

// Calls body(c, count) for the vectors of a row, `count` being a constant but for the last one.
template <int W, typename Body>
SFF_INLINE void for_vectors(int64_t channels, Body body) {
  int64_t c = 0;
  for (; c + W <= channels; c += W) body(c, W);
  if (c < channels) body(c, channels - c);
}

template <typename T, int W>
void normalise_rows(const NormalisePlan& plan, int64_t begin, int64_t end) {
  using A = Acc<T>;
  for_row_blocks(plan, begin, end, [&](int64_t, int64_t n, int64_t t, int64_t p, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      const T* raw = row_at<T>(plan.raw, n, t, p + i);
      const T* residual = row_at<T>(plan.residual, n, t, p + i);
      T* y = row_at<T>(plan.y, n, t, p + i);
      for_vectors<W>(plan.k, [&](int64_t c, int64_t count) {
        auto v = (load<W>(raw + c, count) - load<W>(static_cast<const A*>(plan.mean) + c)) *
                     load<W>(static_cast<const A*>(plan.factor) + c) +
                 load<W>(static_cast<const A*>(plan.beta) + c);
        if (residual) v += load<W>(residual + c, count);
        if (plan.relu) v = relu(v);
        store<W>(y + c, v, count);
      });
    }
  });
}

// Rows that one accumulator sums before it goes into the sum in double: an error of a few units in the last place at
// most.
constexpr int64_t summed_rows = 16;
// Channels whose accumulators lie in L1 while rows go by in their order in memory. Down a column, rows that are a
// multiple of 4 KiB apart would all meet one set of the cache.
constexpr int64_t summed_channels = 256;

// Sums of S values a channel over rows, for at most summed_channels channels: row(i)(c, count, v) adds those of row i
// and of the vector of `count` channels from c on to v[0 ... S - 1].
template <typename A, int W, int S, typename Row>
SFF_INLINE void sum_columns(int64_t rows, int64_t channels, double (*sum)[summed_channels], Row row) {
  using V = Vec<A, W>;
  static_assert(summed_channels % W == 0);
  const int64_t vectors = ceil_div(channels, W);
  for (int s = 0; s < S; ++s)
    for (int64_t c = 0; c < vectors * W; ++c) sum[s][c] = 0;
  for (int64_t r = 0; r < rows; r += summed_rows) {
    const int64_t stop = r + summed_rows < rows ? r + summed_rows : rows;
    V run[summed_channels / W][S];
    for (int64_t i = 0; i < vectors; ++i)
      for (int s = 0; s < S; ++s) run[i][s] = V{};
    const auto add = [&](const auto& next) {
      for_vectors<W>(channels, [&](int64_t c, int64_t count) {
        V v[S];  // in registers, whatever `next` stores elsewhere
        for (int s = 0; s < S; ++s) v[s] = run[c / W][s];
        next(c, count, v);
        for (int s = 0; s < S; ++s) run[c / W][s] = v[s];
      });
    };
    for (int64_t i = r; i < stop; ++i) add(row(i));
    for (int64_t i = 0; i < vectors; ++i)
      for (int s = 0; s < S; ++s) {
        double* to = sum[s] + i * W;
        store<W>(to, load<W>(to) + __builtin_convertvector(run[i][s], Vec<double, W>));
      }
  }
}

template <typename T, int W>
void sum_rows(const SumsPlan& plan, int64_t begin, int64_t end) {
  using V = Vec<Acc<T>, W>;
  for_row_blocks(plan, begin, end, [&](int64_t task, int64_t n, int64_t t, int64_t p, int64_t rows) {
    for (int64_t c0 = 0; c0 < plan.k; c0 += summed_channels) {
      const int64_t channels = plan.k - c0 < summed_channels ? plan.k - c0 : summed_channels;
      double sum[2][summed_channels];
      sum_columns<Acc<T>, W, 2>(rows, channels, sum, [&](int64_t i) {
        const SourceRow<T, W> row(plan.gradient, n, t, p + i);
        T* dresidual = row_at<T>(plan.dresidual, n, t, p + i);
        return [=](int64_t c, int64_t count, V* v) {
          const V g = row.masked(c0 + c, count);
          v[0] += g;
          if (row.raw) v[1] += g * row.centred(c0 + c, count);
          if (dresidual) store<W>(dresidual + c0 + c, g, count);
        };
      });
      for (int s = 0; s < 2; ++s)
        __builtin_memcpy(plan.sums + (2 * task + s) * plan.k + c0, sum[s], size_t(channels) * sizeof(double));
    }
  });
}

// Two passes over the rows of a task, which stay in cache: their mean, then the squares of what deviates from it.
template <typename T, int W>
void moments_of_rows(const MomentsPlan& plan, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using V = Vec<A, W>;
  for_row_blocks(plan, begin, end, [&](int64_t task, int64_t n, int64_t t, int64_t p, int64_t rows) {
    for (int64_t c0 = 0; c0 < plan.k; c0 += summed_channels) {
      const int64_t channels = plan.k - c0 < summed_channels ? plan.k - c0 : summed_channels;
      const auto row = [&](int64_t i) { return row_at<T>(plan.raw, n, t, p + i) + c0; };
      double total[1][summed_channels], sum[2][summed_channels];
      sum_columns<A, W, 1>(rows, channels, total, [&](int64_t i) {
        return [=, raw = row(i)](int64_t c, int64_t count, V* v) { v[0] += load<W>(raw + c, count); };
      });
      A pivot[summed_channels];
      for (int64_t c = 0; c < ceil_div(channels, W) * W; ++c) pivot[c] = A(total[0][c] / double(rows));
      sum_columns<A, W, 2>(rows, channels, sum, [&](int64_t i) {
        return [=, &pivot, raw = row(i)](int64_t c, int64_t count, V* v) {
          const V deviation = load<W>(raw + c, count) - load<W>(pivot + c);
          v[0] += deviation;
          v[1] += deviation * deviation;
        };
      });
      double *mean = plan.moments + task * 2 * plan.k + c0, *m2 = mean + plan.k;
      for (int64_t c = 0; c < channels; ++c) {
        mean[c] = pivot[c] + sum[0][c] / double(rows);
        m2[c] = sum[1][c] - sum[0][c] * sum[0][c] / double(rows);
      }
    }
  });
}

// Several rows at a time, whose sums do not wait for each other; the last ones may be mixed twice.
template <int W>
void mix_rows(const MixPlan& plan, int64_t begin, int64_t end) {
  using V = Vec<double, W>;
  constexpr int together = 4;
  const int64_t ld = plan.padded();
  for_row_blocks(plan, begin, end, [&](int64_t, int64_t n, int64_t t, int64_t p, int64_t rows) {
    for (int64_t i = 0; i < rows; i += together) {
      const float* from[together];
      float* to[together];
      for (int r = 0; r < together; ++r) {
        const int64_t row = p + (i + r < rows ? i + r : rows - 1);
        from[r] = row_at<float>(plan.x, n, t, row);
        to[r] = row_at<float>(plan.y, n, t, row);
      }
      for_vectors<W>(plan.c, [&](int64_t c, int64_t count) {
        V sum[together];
        for (int r = 0; r < together; ++r) sum[r] = load<W>(plan.shift + c);
        for (int64_t j = 0; j < plan.c; ++j) {
          const V mixing = load<W>(plan.mixing + j * ld + c);
          for (int r = 0; r < together; ++r) sum[r] += double(from[r][j]) * mixing;
        }
        for (int r = 0; r < together; ++r) store<W>(to[r] + c, __builtin_convertvector(sum[r], Vec<float, W>), count);
      });
    }
  });
}

template <typename T, int W>
void gradient_rows(const GradientPlan& plan, int64_t begin, int64_t end) {
  for_row_blocks(plan, begin, end, [&](int64_t, int64_t n, int64_t t, int64_t p, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      const SourceRow<T, W> row(plan.gradient, n, t, p + i);
      T* to = row_at<T>(plan.to, n, t, p + i);
      for_vectors<W>(plan.k, [&](int64_t c, int64_t count) { store<W>(to + c, row(c, count), count); });
    }
  });
}

// Reduced channels whose taps are gathered at a time: enough to use every cache line that is touched.
constexpr int64_t gathered = 16;

// to[(c * kt + j) * panel + lane] for `count` reduced channels. Runs along the channels that lie closer to each other;
// the others are often a multiple of 4 KiB apart and would evict each other from the cache.
template <typename T>
SFF_INLINE void gather_taps(const PackPlan& plan, const T* from, int64_t lanes, int64_t count, const Acc<T>* factor,
                            Acc<T>* to) {
  const int64_t kt = plan.kt, panel = plan.panel, next = plan.stride_reduced, tap = plan.stride_tap;
  if (next < plan.stride_out) {
    for (int64_t l = 0; l < lanes; ++l) {
      const T* row = from + l * plan.stride_out;
      for (int64_t j = 0; j < kt; ++j) __builtin_prefetch(row + count * next + j * tap);
      for (int64_t c = 0; c < count; ++c)
        for (int64_t j = 0; j < kt; ++j) to[(c * kt + j) * panel + l] = widen(row[c * next + j * tap]);
    }
  } else {
    for (int64_t c = 0; c < count; ++c)
      for (int64_t j = 0; j < kt; ++j)
        for (int64_t l = 0; l < lanes; ++l)
          to[(c * kt + j) * panel + l] = widen(from[l * plan.stride_out + c * next + j * tap]);
  }
  if (factor)
    for (int64_t c = 0; c < count; ++c)
      for (int64_t i = 0; i < kt * panel; ++i) to[c * kt * panel + i] *= factor[c];
}

// One channel of a panel from its taps: the taps themselves, or U0 ... U3 of winograd.h.
template <int W, typename A>
SFF_INLINE void write_taps(const PackPlan& plan, const A* taps, A* to, int64_t next) {
  using V = Vec<A, W>;
  const int64_t panel = plan.panel;
  if (!plan.winograd) {
    for (int64_t j = 0; j < plan.kt; ++j)
      for (int64_t l = 0; l < panel; l += W) store<W>(to + j * next + l, load<W>(taps + j * panel + l));
    return;
  }
  const A *first = taps + (plan.flip ? 2 : 0) * panel, *last = taps + (plan.flip ? 0 : 2) * panel;
  for (int64_t l = 0; l < panel; l += W) {
    const V g0 = load<W>(first + l), g1 = load<W>(taps + panel + l), g2 = load<W>(last + l), outer = g0 + g2;
    store<W>(to + l, g0);
    store<W>(to + next + l, (outer + g1) * A(0.5));
    store<W>(to + 2 * next + l, (outer - g1) * A(0.5));
    store<W>(to + 3 * next + l, g2);
  }
}

// W divides every panel.
template <typename T, int W>
void pack_panels(const PackPlan& plan, int64_t begin, int64_t end, void* scratch) {
  using A = Acc<T>;
  const A* factor = static_cast<const A*>(plan.factor);
  const int64_t matrices = plan.winograd ? 4 : plan.kt;
  A* taps = static_cast<A*>(scratch);
  for (int64_t index = begin; index < end; ++index) {
    A* to = static_cast<A*>(plan.to) + index * plan.reduced * matrices * plan.panel;
    const int64_t o0 = index * plan.panel, lanes = plan.out - o0 < plan.panel ? plan.out - o0 : plan.panel;
    for (int64_t i = 0; lanes < plan.panel && i < gathered * plan.kt * plan.panel; ++i) taps[i] = 0;
    for (int64_t c0 = 0; c0 < plan.reduced; c0 += plan.c_block, to += plan.c_block * matrices * plan.panel) {
      const int64_t depth = plan.reduced - c0 < plan.c_block ? plan.reduced - c0 : plan.c_block;
      for (int64_t c = 0; c < depth; c += gathered) {
        const int64_t count = depth - c < gathered ? depth - c : gathered, first = c0 + c;
        const T* from = static_cast<const T*>(plan.from) + o0 * plan.stride_out + first * plan.stride_reduced;
        gather_taps(plan, from, lanes, count, factor ? factor + first : nullptr, taps);
        for (int64_t i = 0; i < count; ++i)
          write_taps<W>(plan, taps + i * plan.kt * plan.panel, to + (c + i) * plan.panel, depth * plan.panel);
      }
    }
  }
}

// The sum over all chunks of matrix j for channel c, a panel of lanes.
template <typename A>
SFF_INLINE void sum_chunks(const WgradResult& plan, const A* partial, int64_t chunk_size, int64_t j, int64_t c,
                           double* sum) {
  for (int64_t l = 0; l < plan.panel; ++l) sum[l] = 0;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const A* part = partial + chunk * chunk_size + (j * plan.c + c) * plan.panel;
    for (int64_t l = 0; l < plan.panel; ++l) sum[l] += part[l];
  }
}

// Tap j for channel c: a sum as it is, or the transpose of winograd.h's map of taps to U0 ... U3.
template <typename A>
SFF_INLINE void tap_gradient(const WgradResult& plan, const A* partial, int64_t chunk_size, int64_t j, int64_t c,
                             double* tap) {
  if (!plan.winograd) return sum_chunks(plan, partial, chunk_size, j, c, tap);
  double u1[vector_pad], u2[vector_pad];
  sum_chunks(plan, partial, chunk_size, 1, c, u1);
  sum_chunks(plan, partial, chunk_size, 2, c, u2);
  if (j == 1) {
    for (int64_t l = 0; l < plan.panel; ++l) tap[l] = (u1[l] - u2[l]) / 2;
    return;
  }
  sum_chunks(plan, partial, chunk_size, j == 0 ? 0 : 3, c, tap);
  for (int64_t l = 0; l < plan.panel; ++l) tap[l] += (u1[l] + u2[l]) / 2;
}

template <typename T>
void finish_wgrad(const WgradResult& plan, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t size = (plan.winograd ? 4 : plan.kt) * plan.c * plan.panel,
                chunk_size = ceil_div(plan.k, plan.panel) * size;
  for (int64_t index = begin; index < end; ++index) {
    const A* partial = static_cast<const A*>(plan.partial) + index * size;
    const int64_t k0 = index * plan.panel, lanes = plan.k - k0 < plan.panel ? plan.k - k0 : plan.panel;
    double dscale[vector_pad] = {}, scale[vector_pad];
    for (int64_t l = 0; l < plan.panel; ++l)
      scale[l] = plan.scale && l < lanes ? static_cast<const A*>(plan.scale)[k0 + l] : 1;
    // Blocks of channels, so that the scattered side of the transposition stays within a few cache lines a lane.
    for (int64_t c0 = 0; c0 < plan.c; c0 += gathered) {
      const int64_t count = plan.c - c0 < gathered ? plan.c - c0 : gathered;
      for (int64_t j = 0; j < plan.kt; ++j) {
        const int64_t first = k0 * plan.c * plan.kt + c0 * plan.stride_c + j * plan.stride_tap;
        const auto at = [&](int64_t l, int64_t c) { return first + l * plan.c * plan.kt + c * plan.stride_c; };
        A scaled[gathered][vector_pad];
        for (int64_t c = 0; c < count; ++c) {
          double tap[vector_pad];
          tap_gradient(plan, partial, chunk_size, j, c0 + c, tap);
          for (int64_t l = 0; plan.dscale && l < lanes; ++l)
            dscale[l] += double(widen(static_cast<const T*>(plan.weight)[at(l, c)])) * tap[l];
          for (int64_t l = 0; l < plan.panel; ++l) scaled[c][l] = A(scale[l] * tap[l]);
        }
        for (int64_t l = 0; plan.dweight && l < lanes; ++l)
          for (int64_t c = 0; c < count; ++c) narrow(scaled[c][l], static_cast<T*>(plan.dweight) + at(l, c));
      }
    }
    for (int64_t l = 0; plan.dscale && l < lanes; ++l) static_cast<A*>(plan.dscale)[k0 + l] = A(dscale[l]);
  }
}

}  // namespace slowfast_fast::cpu::SFF_ISA
