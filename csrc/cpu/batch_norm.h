// What is left of BatchNorm when kernels have gone over the rows: per-channel statistics and sums of the tasks, merged
// in their order, in double.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "support.h"

namespace slowfast_fast::cpu {

// Merges the tasks' [mean, M2][k] in order, in double (Chan et al. 1983); rows(task) is how many they are of.
template <typename Count>
void finish_statistics(Dtype dtype, int64_t channels, int64_t tasks, const Count& rows, const double* partial,
                       const BatchStats& stats) {
  std::vector<double> mean(static_cast<size_t>(channels)), m2(static_cast<size_t>(channels));
  double count = 0;
  for (int64_t task = 0; task < tasks; ++task) {
    const double added = static_cast<double>(rows(task)), total = count + added;
    const double* task_mean = partial + task * 2 * channels;
    for (int64_t k = 0; k < channels; ++k) {
      const double delta = task_mean[k] - mean[static_cast<size_t>(k)];
      mean[static_cast<size_t>(k)] += delta * (added / total);
      m2[static_cast<size_t>(k)] += task_mean[channels + k] + delta * delta * (count * added / total);
    }
    count = total;
  }
  // Without rows the statistics are 0, and nothing is normalised with them.
  with_accumulation(dtype, [&](auto zero) {
    using A = decltype(zero);
    for (int64_t k = 0; k < channels; ++k) {
      const double m = m2[static_cast<size_t>(k)];
      static_cast<A*>(stats.mean)[k] = static_cast<A>(mean[static_cast<size_t>(k)]);
      static_cast<A*>(stats.invstd)[k] = static_cast<A>(1 / std::sqrt(m / std::max(count, 1.0) + stats.eps));
      static_cast<A*>(stats.unbiased_var)[k] = static_cast<A>(m / std::max(count - 1, 1.0));
    }
  });
}

// factor = gamma * invstd
inline PaddedVector normalising_factor(Dtype dtype, int64_t k, const void* gamma, const void* invstd) {
  return PaddedVector(dtype, k, gamma, 1.0, invstd);
}

// The tasks' sums, [2][k] each, added in order.
inline std::vector<double> add_sums(const double* partial, int64_t tasks, int64_t k) {
  std::vector<double> sums(static_cast<size_t>(2 * k));
  for (int64_t task = 0; task < tasks; ++task)
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += partial[static_cast<size_t>(task) * sums.size() + i];
  return sums;
}

// What the sums of g and of g * (raw - mean) over `count` rows, one after the other, say of BatchNorm's backward:
// draw = factor * (g - mean(g) - xhat * mean(g * xhat)) = factor * g + slope * (raw - mean) + offset, with xhat =
// (raw - mean) * invstd. dscale and dshift may be nullptr.
inline void finish_sums(Dtype dtype, const std::vector<double>& sums, int64_t count, const void* invstds,
                        const PaddedVector& factors, const PaddedVector& slope, const PaddedVector& offset,
                        void* dscale, void* dshift) {
  const size_t channels = sums.size() / 2;
  const double rows = static_cast<double>(count);
  with_accumulation(dtype, [&](auto zero) {
    using A = decltype(zero);
    for (size_t k = 0; k < channels; ++k) {
      const double sum = sums[k], product = sums[channels + k];
      const double invstd = static_cast<const A*>(invstds)[k], factor = factors.get<A>()[k];
      if (dshift) static_cast<A*>(dshift)[k] = static_cast<A>(sum);
      if (dscale) static_cast<A*>(dscale)[k] = static_cast<A>(product * invstd);
      slope.get<A>()[k] = static_cast<A>(-factor * invstd * invstd * product / rows);
      offset.get<A>()[k] = static_cast<A>(-factor * sum / rows);
    }
  });
}

}  // namespace slowfast_fast::cpu
