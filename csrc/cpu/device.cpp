// The CPU device's convolutions, forward and backward: how they are cut into blocks and tasks.
#include "device.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "batch_norm.h"
#include "support.h"

namespace slowfast_fast {
namespace {

using namespace cpu;

class Taps {
 public:
  // Destination frames sum source frames, in their order: forward (frames of the output over frames of the input) or,
  // transposed, dgrad.
  Taps(const ConvShape& s, bool transposed)
      : frames_(transposed ? s.t_in : s.t_out),
        most_(frames_ * s.kt),
        table_(new int32_t[static_cast<size_t>(frames_ + 1 + 2 * most_)]) {
    int32_t *first = table_.get(), *frame = first + frames_ + 1, *tap = frame + most_;
    int32_t pairs = 0;
    for (int64_t t = 0; t < frames_; ++t) {
      first[t] = pairs;
      for (int64_t i = 0; i < s.kt; ++i) {
        const int64_t j = transposed ? s.kt - 1 - i : i, shift = j * s.dilation - s.padding;
        if (transposed && (t - shift) % s.stride != 0) continue;
        const int64_t source = transposed ? (t - shift) / s.stride : t * s.stride + shift;
        if (source < 0 || source >= (transposed ? s.t_out : s.t_in)) continue;
        frame[pairs] = static_cast<int32_t>(source);
        tap[pairs++] = static_cast<int32_t>(j);
      }
    }
    first[frames_] = pairs;
  }
  TapTable table() const {
    const int32_t* frame = table_.get() + frames_ + 1;
    return {table_.get(), frame, frame + most_};
  }

 private:
  int64_t frames_, most_;
  std::unique_ptr<int32_t[]> table_;  // first, frame and tap
};

// Block sizes from the caches that every core of the supported processors has: 32 KiB of L1 data, 512 KiB of L2. They
// fix the order of summation, so they may depend on shapes and on the instruction set only. plan.h has that of L1.
constexpr int64_t l2_size = 512 << 10;
constexpr int64_t l2_source = 96 << 10, l2_sums = 192 << 10;  // a convolution task's source block and unfinished sums
constexpr int64_t wgrad_x = 128 << 10, wgrad_gradient = 96 << 10;  // a wgrad task's blocks
static_assert(l2_source + l2_sums <= l2_size * 5 / 8 && wgrad_x + wgrad_gradient <= l2_size / 2, "streams need L2 too");

int64_t clamp(int64_t value, int64_t low, int64_t high) { return std::max(low, std::min(value, high)); }

// Tiles of `rows` positions in a block: no more than an image of p has, for which memory would only be asked in vain.
int64_t tiled(int64_t tiles, int64_t rows, int64_t p) { return rows * clamp(tiles, 1, ceil_div(p, rows)); }

bool three_taps(const ConvShape& s) { return s.kt == 3 && s.stride == 1 && s.dilation == 1; }

// Winograd trades a third of the products for additions on its input (C values a row) and output (K): worth it where
// each value meets many of the other side. One frame has no pair.
bool use_winograd(const ConvShape& s, int64_t frames) {
  return three_taps(s) && frames >= 2 && s.c * s.k >= 1024 && s.c >= 16 && s.k >= 16;
}

// Sliding suits narrow layers, where Winograd's transforms weigh more than the products that they save.
Method forward_method(const ConvForward& args) {
  const ConvShape& s = args.shape;
  if (args.dtype == Dtype::Float32 && three_taps(s) && s.c <= 64 && s.k <= 16) return Method::Slide;
  return use_winograd(s, s.t_out) ? Method::Winograd : Method::Direct;
}

// Frames are often a multiple of 4 KiB apart, so that the taps of one position compete for the same sets of L1. Up to
// four taps leave room for the weights beside them; more of them evict a block of weights that is not small.
bool must_gather(const ConvPlan& plan) {
  const Blocking& b = plan.blocking;
  const int64_t weights = plan.kt * b.c_block * b.panel * static_cast<int64_t>(acc_size(plan.dtype));
  return plan.method == Method::Direct && plan.kt > 4 && weights > l1_weights / 2;
}

// The panels of a task: as many as keep its unfinished sums in L2, but fewer where images are small and tasks few. Each
// group of panels reads the source anew, so 16 tasks have to do.
int64_t panel_group(const ConvPlan& plan, const Blocking& b, int64_t sum_frames) {
  const int64_t size = static_cast<int64_t>(acc_size(plan.dtype)), panels = ceil_div(plan.k, b.panel);
  const int64_t most = clamp(l2_sums / (sum_frames * b.p_block * size) / b.panel, 1, panels);
  const int64_t row_tasks = std::max<int64_t>(1, plan.n * ceil_div(plan.p, b.p_block) * ceil_div(plan.t, b.t_block));
  return b.panel * std::min(most, ceil_div(panels, clamp(16 / row_tasks, 1, panels)));
}

Blocking conv_blocking(const ConvPlan& plan) {
  const bool slide = plan.method == Method::Slide;
  const TileShape tile = slide ? kernels().slide_tile() : kernels().tile(plan.dtype, plan.k);
  const int64_t size = static_cast<int64_t>(acc_size(plan.dtype));
  Blocking b;
  b.panel = tile.panel;
  if (slide) {
    b.k_group = tile.panel * ceil_div(plan.k, tile.panel);
    b.c_block = plan.c;
    // Sums leave most of L2 to the rows that are asked for ahead.
    b.t_block = std::min<int64_t>(plan.t, 32);
    b.p_block = tiled(l2_sums / 4 / (b.t_block * b.k_group * size) / tile.rows, tile.rows, plan.p);
    return b;
  }
  const bool winograd = plan.method == Method::Winograd;
  // Weight matrices in L1 at a time, source rows and sums held per position of a block.
  const int64_t matrices = winograd ? 1 : plan.kt;
  b.t_block = std::min<int64_t>(plan.t, winograd ? 4 : 8);
  const int64_t source_frames = winograd ? 2 * b.t_block : b.t_block + plan.kt;
  const int64_t sum_frames = winograd ? 2 * b.t_block : b.t_block;
  const int64_t depth = std::min<int64_t>(l1_weights / (matrices * tile.panel * size), 128);
  b.c_block = plan.c <= depth ? plan.c : clamp(depth / 16 * 16, 16, plan.c);
  b.p_block = tile.rows * clamp(l2_source / (source_frames * b.c_block * size) / tile.rows, 1, 48 / tile.rows);
  b.k_group = panel_group(plan, b, sum_frames);
  return b;
}

int64_t row_tasks(const ConvPlan& plan) {
  return plan.n * ceil_div(plan.p, plan.blocking.p_block) * ceil_div(plan.t, plan.blocking.t_block);
}

// A weight in memory: strides of the product's output and reduced channels and of its taps, which are reversed or not,
// the reduced channels multiplied by `factor` (the scale, in dgrad) where there is one.
struct PlainWeight {
  const void* data;
  int64_t stride_out, stride_reduced, stride_tap;
  bool flip;
  const void* factor;
};

PlainWeight forward_weight(const ConvForward& args) {
  const ConvShape& s = args.shape;
  return {args.weight, s.c * s.kt, s.weight_stride_c(), s.weight_stride_tap(), false, nullptr};
}

size_t packed_size(const ConvPlan& plan) {
  const int64_t panels = ceil_div(plan.k, plan.blocking.panel),
                matrices = plan.method == Method::Winograd ? 4 : plan.kt;
  return static_cast<size_t>(panels * plan.blocking.panel * plan.c * matrices) * acc_size(plan.dtype);
}

void pack_weight(const ConvPlan& plan, const PlainWeight& weight, void* to) {
  const Blocking& b = plan.blocking;
  const PackPlan pack{plan.dtype,
                      plan.k,
                      plan.c,
                      plan.kt,
                      weight.stride_out,
                      weight.stride_reduced,
                      weight.stride_tap,
                      b.panel,
                      b.c_block,
                      plan.method == Method::Winograd,
                      weight.flip,
                      weight.data,
                      weight.factor,
                      to};
  parallel(ceil_div(plan.k, b.panel), kernels().pack_scratch(pack),
           [&](int64_t begin, int64_t end, void* scratch) { kernels().pack(pack, begin, end, scratch); });
}

// Runs the product, with the weights that plan.weight has packed already, or else packs them.
void run_conv(ConvPlan plan, const PlainWeight& weight) {
  const Blocking& b = plan.blocking;
  const Buffer packed(plan.weight ? 0 : packed_size(plan));
  if (!plan.weight) {
    pack_weight(plan, weight, packed.get());
    plan.weight = packed.get();
  }
  parallel(row_tasks(plan) * ceil_div(plan.k, b.k_group), kernels().conv_scratch(plan),
           [&](int64_t begin, int64_t end, void* scratch) { kernels().conv(plan, begin, end, scratch); });
}

// The product of a convolution of that shape or, transposed, of its dgrad, but for its epilogue. `lead` as in ConvPlan.
ConvPlan conv_plan(const ConvShape& s, bool transposed, Dtype dtype, const Source& source, const Taps& taps,
                   Method method, int64_t lead) {
  ConvPlan plan{};
  plan.dtype = dtype;
  plan.n = s.n;
  plan.p = s.p;
  plan.c = transposed ? s.k : s.c;
  plan.k = transposed ? s.c : s.k;
  plan.t_source = transposed ? s.t_out : s.t_in;
  plan.t = transposed ? s.t_in : s.t_out;
  plan.kt = s.kt;
  plan.source = source;
  plan.taps = taps.table();
  plan.method = method;
  plan.lead = lead;
  plan.blocking = conv_blocking(plan);
  plan.gather = must_gather(plan);
  return plan;
}

ConvPlan forward_plan(const ConvForward& args, const Taps& taps) {
  Source x{};
  x.rows = args.x;
  ConvPlan plan = conv_plan(args.shape, false, args.dtype, x, taps, forward_method(args), -args.shape.padding);
  plan.residual = args.residual;
  plan.relu = args.relu;
  plan.y = args.y;
  return plan;
}

// The vectors of a normalised Source (plan.h); they live as long as the gradient is read.
struct NormalisedGradient {
  PaddedVector mean, factor, beta, slope, offset;

  NormalisedGradient(const ConvBackward& args, int64_t k)
      : mean(args.dtype, k, args.bn.mean, 0),
        factor(normalising_factor(args.dtype, k, args.bn.gamma, args.bn.invstd)),
        beta(args.dtype, k, args.bn.beta, 0),
        slope(args.dtype, k, nullptr, 0),
        offset(args.dtype, k, nullptr, 0) {}

  void attach(Source& source) const {
    source.mean = mean.get();
    source.factor = factor.get();
    source.beta = beta.get();
    source.slope = slope.get();
    source.offset = offset.get();
  }
};

// Per channel the sums of g and of g * (raw - mean) over all rows, in double; writes dresidual on the way.
std::vector<double> gradient_sums(const ConvBackward& args, const Source& gradient) {
  const ConvShape& s = args.shape;
  const int64_t tasks = s.n * s.t_out * ceil_div(s.p, row_block);
  const Buffer partial(static_cast<size_t>(tasks * 2 * s.k) * sizeof(double));
  const SumsPlan plan{args.dtype, s.n, s.t_out, s.p, s.k, gradient, partial.get<double>(), args.dresidual};
  parallel(tasks, [&](int64_t begin, int64_t end) { kernels().sums(plan, begin, end); });
  return add_sums(plan.sums, tasks, s.k);
}

void dgrad(const ConvBackward& args, const Source& gradient) {
  const ConvShape& s = args.shape;
  const Taps taps(s, true);
  const Method method = use_winograd(s, s.t_in) ? Method::Winograd : Method::Direct;
  ConvPlan plan = conv_plan(s, true, args.dtype, gradient, taps, method, s.padding - 2);
  plan.residual = args.dx_residual;
  plan.y = args.dx;
  run_conv(plan, {args.weight, s.weight_stride_c(), s.c * s.kt, s.weight_stride_tap(), true, args.scale});
}

// How the products of a wgrad are summed.
struct WgradSums {
  Dtype in;    // Float64: in double, whatever the values are stored as; otherwise their dtype
  bool exact;  // in one accumulator few at a time
  bool ones;   // as in WgradPlan
};

void wgrad(const ConvBackward& args, const Source& gradient, const WgradSums& sums) {
  const ConvShape& s = args.shape;
  const Taps taps(s, false);
  const TileShape tile = kernels().tile(sums.in, s.k);
  const int64_t size = static_cast<int64_t>(acc_size(sums.in)), panels = ceil_div(s.k, tile.panel);
  const bool exact = sums.exact;
  WgradPlan plan{};
  plan.dtype = args.dtype;
  plan.in_double = sums.in == Dtype::Float64;
  plan.ones = sums.ones;
  plan.n = s.n;
  plan.p = s.p;
  plan.c = s.c;
  plan.k = s.k;
  plan.t_in = s.t_in;
  plan.t_out = s.t_out;
  plan.kt = s.kt;
  plan.x.rows = args.x;
  plan.gradient = gradient;
  plan.taps = taps.table();
  // A panel of gradient rows and a cache line of input rows, for every row of a block, share L1.
  plan.winograd = !exact && use_winograd(s, s.t_out);
  plan.lead = -s.padding;
  plan.summed_rows = exact ? 16 : plan.winograd ? 128 : 256;
  plan.blocking.panel = tile.panel;
  plan.blocking.t_block = std::min<int64_t>(s.t_out, 8);
  plan.blocking.p_block = exact ? 16 : clamp(l1_weights / (plan.blocking.t_block * tile.panel * size), 8, 32);
  const int64_t rows = (plan.winograd ? 2 : 1) * plan.blocking.t_block * plan.blocking.p_block;
  plan.blocking.c_block = clamp(wgrad_x / (rows * size) / 16 * 16, 16, std::max<int64_t>(s.c, 16));
  // 16 tasks or more: by groups of panels (of two at least, since each reads all of x) and, where the weight is narrow,
  // by chunks of rows, each with sums of the weight's size. No chunk adds up more than a few blocks in single
  // precision.
  plan.blocking.k_group =
      tile.panel *
      std::min(panels, clamp(panels / 16, 2, std::max<int64_t>(2, wgrad_gradient / (rows * size) / tile.panel)));
  const int64_t groups = ceil_div(s.k, plan.blocking.k_group), blocks = s.n * ceil_div(s.p, plan.blocking.p_block);
  plan.chunks = std::max<int64_t>(1, std::min(blocks, std::max(16 / groups, ceil_div(blocks, exact ? 4 : 16))));
  const Buffer partial(
      static_cast<size_t>(plan.chunks * panels * tile.panel * s.c * (plan.winograd ? 4 : s.kt) * size));
  plan.partial = partial.get();
  parallel(groups * plan.chunks, kernels().wgrad_scratch(plan),
           [&](int64_t begin, int64_t end, void* scratch) { kernels().wgrad(plan, begin, end, scratch); });
  const WgradResult result{sums.in,
                           s.c,
                           s.k,
                           s.kt,
                           s.weight_stride_c(),
                           s.weight_stride_tap(),
                           tile.panel,
                           plan.chunks,
                           plan.winograd,
                           partial.get(),
                           args.weight,
                           args.scale,
                           args.dweight,
                           args.bn.raw.data ? nullptr : args.dscale};
  parallel(panels, [&](int64_t begin, int64_t end) { kernels().wgrad_result(result, begin, end); });
}

}  // namespace

void Cpu::forward(const ConvForward& args) {
  const Taps taps(args.shape, false);
  ConvPlan plan = forward_plan(args, taps);
  const int64_t k = args.shape.k;
  const PaddedVector scale(args.dtype, k, args.scale, 1), shift(args.dtype, k, args.shift, 0);
  if (args.scale || args.shift) {
    plan.scale = scale.get();
    plan.shift = shift.get();
  }
  plan.weight = args.packed;
  run_conv(plan, forward_weight(args));
}

int64_t Cpu::packed_bytes(const ConvForward& args) {
  const Taps taps(args.shape, false);
  return static_cast<int64_t>(packed_size(forward_plan(args, taps)));
}

void Cpu::pack(const ConvForward& args, void* to) {
  const Taps taps(args.shape, false);
  pack_weight(forward_plan(args, taps), forward_weight(args), to);
}

void Cpu::forward_stats(const ConvForward& args, const BatchStats& stats) {
  const Taps taps(args.shape, false);
  ConvPlan plan = forward_plan(args, taps);
  const Buffer partial(static_cast<size_t>(row_tasks(plan) * 2 * plan.k) * sizeof(double));
  plan.statistics = partial.get<double>();
  run_conv(plan, forward_weight(args));
  const int64_t p_blocks = ceil_div(plan.p, plan.blocking.p_block), t_blocks = ceil_div(plan.t, plan.blocking.t_block);
  const auto rows = [&](int64_t task) {
    const int64_t block = task / t_blocks % p_blocks, t0 = task % t_blocks * plan.blocking.t_block;
    return (plan.p / p_blocks + (block < plan.p % p_blocks)) * std::min(plan.blocking.t_block, plan.t - t0);
  };
  finish_statistics(args.dtype, plan.k, row_tasks(plan), rows, partial.get<double>(), stats);
}

void Cpu::backward(const ConvBackward& args) {
  const ConvShape& s = args.shape;
  const bool bn = args.bn.raw.data != nullptr;
  Source gradient{};
  gradient.rows = args.grad;
  gradient.relu = args.relu;
  gradient.y = bn ? Rows{} : args.y;
  gradient.raw = args.bn.raw;
  gradient.residual = args.bn.residual;
  const bool products = args.dx.data || args.dweight || args.dconv.data || (!bn && args.dscale);
  std::unique_ptr<NormalisedGradient> normalised;
  if (bn) {
    normalised = std::make_unique<NormalisedGradient>(args, s.k);
    normalised->attach(gradient);
  }
  if (args.dshift || args.dresidual.data || (bn && (products || args.dscale))) {
    const std::vector<double> sums = gradient_sums(args, gradient);
    if (bn)
      finish_sums(args.dtype, sums, s.n * s.t_out * s.p, args.bn.invstd, normalised->factor, normalised->slope,
                  normalised->offset, args.dscale, args.dshift);
    else if (args.dshift)
      with_accumulation(args.dtype, [&](auto zero) {
        using A = decltype(zero);
        for (int64_t k = 0; k < s.k; ++k)
          static_cast<A*>(args.dshift)[k] = static_cast<A>(sums[static_cast<size_t>(k)]);
      });
  }
  if (args.dconv.data) {
    const GradientPlan plan{args.dtype, s.n, s.t_out, s.p, s.k, gradient, args.dconv};
    parallel(s.n * s.t_out * ceil_div(s.p, row_block),
             [&](int64_t begin, int64_t end) { kernels().gradient(plan, begin, end); });
    gradient = {};
    gradient.rows = {args.dconv.data, args.dconv.stride_n, args.dconv.stride_t, args.dconv.stride_p};
  }
  if (args.dx.data) dgrad(args, gradient);
  // dscale = sum(weight * dweight) is a small difference of large terms: its sums are short and direct.
  if (args.dweight || (!bn && args.dscale)) wgrad(args, gradient, {args.dtype, args.dscale && !bn, false});
}

void Cpu::row_products(const FoldedBackward& norm, const Rows& left, int64_t channels, double* to) {
  ConvBackward args{};
  args.shape = {norm.n, norm.c + 1, channels, norm.t, norm.t, norm.p, 1, 1, 0, 1};
  args.dtype = norm.dtype;
  args.x = norm.x;
  args.dweight = to;
  Source source{};
  source.rows = left;
  wgrad(args, source, {Dtype::Float64, false, true});
}

}  // namespace slowfast_fast
