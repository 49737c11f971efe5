// The kernels for one instruction set, SFF_ISA, and every storage type. This file and what it includes use no template
// or inline function of the standard library or of PyTorch: the linker could keep the copy compiled for AVX-512 and
// give it to code that must run anywhere.
#include "bottleneck.h"
#include "conv.h"
#include "pathways.h"
#include "pool.h"
#include "rowwise.h"
#include "slide.h"
#include "spatial_wgrad.h"
#include "stem.h"
#include "wgrad.h"
#include "winograd.h"

namespace slowfast_fast::cpu::SFF_ISA {
namespace {

template <typename Body>
SFF_INLINE auto with_dtype(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::Float64: return body(Of<double>{});
    case Dtype::Float16: return body(Of<Half>{});
    case Dtype::BFloat16: return body(Of<BFloat16>{});
    default: return body(Of<float>{});
  }
}

template <typename Body>
SFF_INLINE auto with_dtype_and_tile(Dtype dtype, int64_t k, Body body) {
  return with_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return with_tile<T>(k, [&](auto tile) { return body(t, tile); });
  });
}

template <typename T>
constexpr int row_width = sizeof(Acc<T>) == 8 ? Wide64::W : Narrow32::W;

TileShape tile(Dtype dtype, int64_t k) {
  return with_dtype_and_tile(dtype, k, [](auto, auto tile) {
    using Tl = typename decltype(tile)::type;
    static_assert(Tl::panel <= vector_pad);
    return TileShape{Tl::MR, Tl::panel};
  });
}

TileShape slide_tile() { return {slide_rows, Slide32::panel}; }

// The output channels of a plan, of itself or of its shape.
template <typename Plan>
SFF_INLINE auto channels_of(const Plan& plan) -> decltype(plan.shape.k) {
  return plan.shape.k;
}
template <typename Plan>
SFF_INLINE auto channels_of(const Plan& plan) -> decltype(plan.k) {
  return plan.k;
}

template <template <typename, typename> class Task, typename Plan>
SFF_INLINE int64_t scratch_of(const Plan& plan) {
  return with_dtype_and_tile(plan.dtype, channels_of(plan), [&](auto t, auto tile) {
    return Task<typename decltype(t)::type, typename decltype(tile)::type>::scratch(plan);
  });
}

template <typename Task, typename Plan>
SFF_INLINE void run_tasks(const Plan& plan, int64_t begin, int64_t end, void* scratch) {
  Task task(plan, scratch);
  for (int64_t i = begin; i < end; ++i) task.run(i);
}

template <template <typename, typename> class Task, typename Plan>
SFF_INLINE void run_tasks(const Plan& plan, int64_t begin, int64_t end, void* scratch) {
  with_dtype_and_tile(plan.dtype, channels_of(plan), [&](auto t, auto tile) {
    run_tasks<Task<typename decltype(t)::type, typename decltype(tile)::type>>(plan, begin, end, scratch);
  });
}

int64_t conv_scratch(const ConvPlan& plan) {
  switch (plan.method) {
    case Method::Winograd: return scratch_of<WinogradTask>(plan);
    case Method::Slide: return SlideTask::scratch(plan);
    default: return scratch_of<ConvTask>(plan);
  }
}
// Calls body with the storage type of a plan's values and the register tile that sums their products.
template <typename Body>
SFF_INLINE auto with_wgrad_types(const WgradPlan& plan, Body body) {
  if (plan.in_double && plan.dtype == Dtype::Float32) return body(Of<float>{}, Of<Wide64>{});
  return with_dtype_and_tile(plan.dtype, plan.k, body);
}
int64_t wgrad_scratch(const WgradPlan& plan) {
  return with_wgrad_types(plan, [&](auto t, auto tile) {
    return WgradTask<typename decltype(t)::type, typename decltype(tile)::type>::scratch(plan);
  });
}
void conv(const ConvPlan& plan, int64_t begin, int64_t end, void* scratch) {
  switch (plan.method) {
    case Method::Winograd: return run_tasks<WinogradTask>(plan, begin, end, scratch);
    case Method::Slide: return run_tasks<SlideTask>(plan, begin, end, scratch);
    default: return run_tasks<ConvTask>(plan, begin, end, scratch);
  }
}
void wgrad(const WgradPlan& plan, int64_t begin, int64_t end, void* scratch) {
  with_wgrad_types(plan, [&](auto t, auto tile) {
    run_tasks<WgradTask<typename decltype(t)::type, typename decltype(tile)::type>>(plan, begin, end, scratch);
  });
}

int64_t pack_scratch(const PackPlan& plan) { return gathered * plan.kt * plan.panel * int64_t(sizeof(double)); }
void pack(const PackPlan& plan, int64_t begin, int64_t end, void* scratch) {
  with_dtype(plan.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    pack_panels<T, row_width<T>>(plan, begin, end, scratch);
  });
}
void wgrad_result(const WgradResult& plan, int64_t begin, int64_t end) {
  with_dtype(plan.dtype, [&](auto t) { finish_wgrad<typename decltype(t)::type>(plan, begin, end); });
}
int64_t bottleneck_scratch(const BottleneckPlan& plan) {
  return with_dtype(plan.block.dtype,
                    [&](auto t) { return BottleneckTask<typename decltype(t)::type>::scratch(plan); });
}
void bottleneck(const BottleneckPlan& plan, int64_t begin, int64_t end, void* scratch) {
  with_dtype(plan.block.dtype,
             [&](auto t) { run_tasks<BottleneckTask<typename decltype(t)::type>>(plan, begin, end, scratch); });
}
int64_t stem_scratch(const StemPlan& plan) { return scratch_of<StemTask>(plan); }
void stem(const StemPlan& plan, int64_t begin, int64_t end, void* scratch) {
  run_tasks<StemTask>(plan, begin, end, scratch);
}
int64_t stem_wgrad_scratch(const StemPlan& plan) { return scratch_of<StemWgradTask>(plan); }
void stem_wgrad(const StemPlan& plan, int64_t begin, int64_t end, void* scratch) {
  run_tasks<StemWgradTask>(plan, begin, end, scratch);
}
void pack_spatial(const SpatialPackPlan& plan, int64_t begin, int64_t end) {
  with_dtype(plan.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    pack_spatial_weight<T, row_width<T>>(plan, begin, end);
  });
}
int64_t spatial_scratch(const SpatialPlan& plan) { return scratch_of<SpatialTask>(plan); }
void spatial(const SpatialPlan& plan, int64_t begin, int64_t end, void* scratch) {
  run_tasks<SpatialTask>(plan, begin, end, scratch);
}
int64_t spatial_wgrad_scratch(const SpatialWgradPlan& plan) { return scratch_of<SpatialWgradTask>(plan); }
void spatial_wgrad(const SpatialWgradPlan& plan, int64_t begin, int64_t end, void* scratch) {
  run_tasks<SpatialWgradTask>(plan, begin, end, scratch);
}
void spatial_weight_gradient(const SpatialWeightGradientPlan& plan, int64_t begin, int64_t end) {
  with_dtype(plan.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    finish_spatial_wgrad<T>(plan, begin, end);
  });
}
void normalise(const NormalisePlan& plan, int64_t begin, int64_t end) {
  with_dtype(plan.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    normalise_rows<T, row_width<T>>(plan, begin, end);
  });
}
void sums(const SumsPlan& plan, int64_t begin, int64_t end) {
  with_dtype(plan.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    sum_rows<T, row_width<T>>(plan, begin, end);
  });
}

void moments(const MomentsPlan& plan, int64_t begin, int64_t end) {
  with_dtype(plan.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    moments_of_rows<T, row_width<T>>(plan, begin, end);
  });
}
void mix(const MixPlan& plan, int64_t begin, int64_t end) { mix_rows<row_width<double>>(plan, begin, end); }
void gradient(const GradientPlan& plan, int64_t begin, int64_t end) {
  with_dtype(plan.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    gradient_rows<T, row_width<T>>(plan, begin, end);
  });
}

void max_pool(const PoolPlan& plan, int64_t begin, int64_t end) {
  with_dtype(plan.pool.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    max_pool_rows<T, row_width<T>>(plan, begin, end);
  });
}
void pool_sums(const PoolSumsPlan& plan, int64_t begin, int64_t end) {
  with_dtype(plan.forward.pool.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    pool_sum_rows<T, row_width<T>>(plan, begin, end);
  });
}
void pool_gradient(const PoolGradientPlan& plan, int64_t begin, int64_t end) {
  with_dtype(plan.forward.pool.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    pool_gradient_rows<T, row_width<T>>(plan, begin, end);
  });
}

void pack_pathways(const PackPathways& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    pack_pathways_rows<T, row_width<T>>(args, begin, end);
  });
}

#define SFF_NAME_(isa) #isa
#define SFF_NAME(isa) SFF_NAME_(isa)

}  // namespace

const Kernels& kernels() {
  static constexpr Kernels table{SFF_NAME(SFF_ISA),
                                 tile,
                                 slide_tile,
                                 pack_scratch,
                                 pack,
                                 conv_scratch,
                                 conv,
                                 wgrad_scratch,
                                 wgrad,
                                 wgrad_result,
                                 bottleneck_scratch,
                                 bottleneck,
                                 stem_scratch,
                                 stem,
                                 stem_wgrad_scratch,
                                 stem_wgrad,
                                 pack_spatial,
                                 spatial_scratch,
                                 spatial,
                                 spatial_wgrad_scratch,
                                 spatial_wgrad,
                                 spatial_weight_gradient,
                                 normalise,
                                 sums,
                                 moments,
                                 mix,
                                 gradient,
                                 max_pool,
                                 pool_sums,
                                 pool_gradient,
                                 pack_pathways};
  return table;
}

}  // namespace slowfast_fast::cpu::SFF_ISA
