// The CPU device, but for its convolutions: what goes over rows, frames or vectors.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <type_traits>

#include "batch_norm.h"
#include "device.h"

namespace slowfast_fast {
namespace {

using namespace cpu;

// The padded vectors of a PoolPlan that normalises, and that plan while they live.
struct PoolVectors {
  PaddedVector mean, factor, beta;

  explicit PoolVectors(const NormalisePool& args)
      : mean(args.pool.dtype, args.pool.c, args.mean, 0),
        factor(normalising_factor(args.pool.dtype, args.pool.c, args.gamma, args.invstd)),
        beta(args.pool.dtype, args.pool.c, args.beta, 0) {}

  PoolPlan plan(const NormalisePool& args) const {
    return {args.pool, mean.get(), factor.get(), beta.get(), args.relu};
  }
};

}  // namespace

void Cpu::statistics(const RowStatistics& args) {
  const int64_t blocks = ceil_div(args.p, row_block), tasks = args.n * args.t * blocks;
  const Buffer partial(static_cast<size_t>(tasks * 2 * args.k) * sizeof(double));
  const MomentsPlan plan{args.dtype, args.n, args.t, args.p, args.k, args.raw, partial.get<double>()};
  parallel(tasks, [&](int64_t begin, int64_t end) { kernels().moments(plan, begin, end); });
  const auto rows = [&](int64_t task) { return std::min(row_block, args.p - task % blocks * row_block); };
  finish_statistics(args.dtype, args.k, tasks, rows, plan.moments, args.stats);
}

void Cpu::normalise(const Normalise& args) {
  const PaddedVector mean(args.dtype, args.k, args.mean, 0), beta(args.dtype, args.k, args.beta, 0);
  const PaddedVector factor = normalising_factor(args.dtype, args.k, args.gamma, args.invstd);
  const NormalisePlan plan{args.dtype,    args.n,     args.t,       args.p,     args.k,    args.raw,
                           args.residual, mean.get(), factor.get(), beta.get(), args.relu, args.y};
  parallel(args.n * args.t * ceil_div(args.p, row_block),
           [&](int64_t begin, int64_t end) { kernels().normalise(plan, begin, end); });
}

void Cpu::copy(const CopyRows& args) {
  const int64_t size = static_cast<int64_t>(storage_size(args.dtype)), blocks = ceil_div(args.p, row_block);
  const auto* from = static_cast<const char*>(args.from.data);
  auto* to = static_cast<char*>(args.to.data);
  parallel(args.n * args.t * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t frame = task / blocks, n = frame / args.t, t = frame % args.t;
      const int64_t p_end = std::min(args.p, (task % blocks + 1) * row_block);
      for (int64_t p = task % blocks * row_block; p < p_end; ++p)
        std::memcpy(to + (n * args.to.stride_n + t * args.to.stride_t + p * args.to.stride_p) * size,
                    from + (n * args.from.stride_n + t * args.from.stride_t + p * args.from.stride_p) * size,
                    static_cast<size_t>(args.c * size));
    }
  });
}

void Cpu::max_pool(const MaxPool& args) {
  const PoolPlan plan{args, nullptr, nullptr, nullptr, false};
  parallel(args.n * args.t * args.h_out, [&](int64_t begin, int64_t end) { kernels().max_pool(plan, begin, end); });
}

void Cpu::normalise_pool(const NormalisePool& args) {
  const MaxPool& pool = args.pool;
  const PoolVectors vectors(args);
  const PoolPlan plan = vectors.plan(args);
  parallel(pool.n * pool.t * pool.h_out, [&](int64_t begin, int64_t end) { kernels().max_pool(plan, begin, end); });
}

void Cpu::normalise_pool_backward(const NormalisePoolBackward& args) {
  const MaxPool& pool = args.forward.pool;
  const int64_t frames = pool.n * pool.t, tasks = frames * pool.h_out;
  const PoolVectors vectors(args.forward);
  const Buffer partial(static_cast<size_t>(tasks * 2 * pool.c) * sizeof(double));
  // The last places are read as a whole vector.
  const Buffer place(static_cast<size_t>(tasks * pool.w_out * pool.c + vector_pad));
  const PoolSumsPlan windows{vectors.plan(args.forward), args.grad, place.get<uint8_t>(), partial.get<double>()};
  parallel(tasks, [&](int64_t begin, int64_t end) { kernels().pool_sums(windows, begin, end); });
  const PaddedVector slope(pool.dtype, pool.c, nullptr, 0), offset(pool.dtype, pool.c, nullptr, 0);
  finish_sums(pool.dtype, add_sums(windows.sums, tasks, pool.c), frames * pool.h_in * pool.w_in, args.forward.invstd,
              vectors.factor, slope, offset, args.dgamma, args.dbeta);
  if (!args.dx.data) return;
  const PoolGradientPlan plan{windows.forward, args.grad, windows.place, slope.get(), offset.get(), args.dx};
  parallel(frames * pool.h_in, [&](int64_t begin, int64_t end) { kernels().pool_gradient(plan, begin, end); });
}

void Cpu::pack_pathways(const PackPathways& args) {
  parallel(args.n * args.t * args.h, [&](int64_t begin, int64_t end) { kernels().pack_pathways(args, begin, end); });
}

void Cpu::fold(const FoldBatchNorm& args) {
  with_accumulation(args.dtype, [&](auto zero) {
    using A = decltype(zero);
    const auto at = [](const void* values, int64_t k) { return static_cast<const A*>(values)[k]; };
    for (int64_t k = 0; k < args.k; ++k) {
      const A invstd = 1 / std::sqrt(at(args.var, k) + static_cast<A>(args.eps));
      const A scale = args.gamma ? at(args.gamma, k) * invstd : invstd;
      static_cast<A*>(args.scale)[k] = scale;
      static_cast<A*>(args.shift)[k] = (args.beta ? at(args.beta, k) : 0) - at(args.mean, k) * scale;
    }
  });
}

void Cpu::update_running(const RunningStats& args) {
  if (args.num_batches_tracked) ++*args.num_batches_tracked;
  const double factor = args.cumulative ? 1.0 / static_cast<double>(*args.num_batches_tracked) : args.momentum;
  const auto update = [&](void* running, const void* batch) {
    if (!running) return;
    const auto run = [&](auto* values) {
      using T = std::remove_pointer_t<decltype(values)>;
      for (int64_t k = 0; k < args.k; ++k) {
        const double added =
            args.batch_is_double ? static_cast<const double*>(batch)[k] : static_cast<const float*>(batch)[k];
        values[k] = static_cast<T>((1 - factor) * static_cast<double>(values[k]) + factor * added);
      }
    };
    switch (args.running_dtype) {
      case Dtype::Float32: return run(static_cast<float*>(running));
      case Dtype::Float64: return run(static_cast<double*>(running));
      case Dtype::Float16: return run(static_cast<torch::headeronly::Half*>(running));
      case Dtype::BFloat16: return run(static_cast<torch::headeronly::BFloat16*>(running));
    }
  };
  update(args.running_mean, args.mean);
  update(args.running_var, args.unbiased_var);
}

}  // namespace slowfast_fast
