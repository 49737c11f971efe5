// The CPU device's convolution of a stem: its bands, and its weight between memory and the kernels' order.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "device.h"
#include "support.h"

namespace slowfast_fast {
namespace {

using namespace cpu;

// The frames that a forward task keeps stay in L2 beside the weights. A band of a weight's gradient has the rows that
// one sum in single precision takes, and it and its gradient stay in L1.
constexpr int64_t forward_frames = 256 << 10, summed_rows = 256;
// Of the gradient, whatever the number of threads, each with a sum of the weight's size.
constexpr int64_t most_chunks = 32;

int64_t bands(const StemPlan& plan) { return plan.shape.n * ceil_div(plan.shape.out[1], plan.band); }

int64_t taps(const StemShape& s) { return s.kernel[0] * s.kernel[1] * s.kernel[2] * s.c; }

// visit(place in the kernels' order, offset in memory) for the weights of output channel k.
template <typename Visit>
void visit_weights(const StemShape& s, const StridedClips& weight, int64_t panel, int64_t k, const Visit& visit) {
  int64_t place = k / panel * panel * taps(s) + k % panel;
  for (int64_t i = 0; i < s.kernel[0]; ++i)
    for (int64_t j = 0; j < s.kernel[1]; ++j)
      for (int64_t l = 0; l < s.kernel[2]; ++l)
        for (int64_t c = 0; c < s.c; ++c, place += panel)
          visit(place, k * weight.n + c * weight.c + i * weight.t + j * weight.h + l * weight.w);
}

template <typename Body>
void with_storage(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::Float32: return body(float{});
    case Dtype::Float64: return body(double{});
    case Dtype::Float16: return body(torch::headeronly::Half{});
    case Dtype::BFloat16: return body(torch::headeronly::BFloat16{});
  }
}

}  // namespace

void Cpu::stem_forward(const StemForward& args) {
  const StemShape& s = args.shape;
  StemPlan plan = plan_of<StemPlan>(args);
  const int64_t panel = kernels().tile(args.dtype, s.k).panel, size = static_cast<int64_t>(acc_size(args.dtype));
  const int64_t row = plan.row_length() * size;
  plan.band =
      std::max<int64_t>(1, std::min(s.out[1], (forward_frames / (s.kernel[0] * row) - s.kernel[1]) / s.stride[1] + 1));
  const int64_t padded = ceil_div(s.k, panel) * panel;
  const Buffer weight(static_cast<size_t>(padded * taps(s) * size));
  with_accumulation(args.dtype, [&](auto zero) {
    using A = decltype(zero);
    A* packed = weight.get<A>();
    std::fill(packed, packed + padded * taps(s), zero);
    with_storage(args.dtype, [&](auto value) {
      const auto* from = static_cast<const decltype(value)*>(args.weight.data);
      for (int64_t k = 0; k < s.k; ++k)
        visit_weights(s, args.weight, panel, k,
                      [&](int64_t place, int64_t offset) { packed[place] = static_cast<A>(from[offset]); });
    });
  });
  const PaddedVector shift(args.dtype, s.k, args.shift, 0);
  plan.weight = weight.get();
  plan.shift = args.shift ? shift.get() : nullptr;
  plan.relu = args.relu;
  plan.y = args.y;
  parallel(bands(plan), kernels().stem_scratch(plan),
           [&](int64_t begin, int64_t end, void* scratch) { kernels().stem(plan, begin, end, scratch); });
}

void Cpu::stem_wgrad(const StemWgrad& args) {
  const StemShape& s = args.shape;
  StemPlan plan = plan_of<StemPlan>(args);
  const int64_t panel = kernels().tile(args.dtype, s.k).panel;
  plan.band = std::max<int64_t>(1, std::min(s.out[1], summed_rows / s.out[2]));
  plan.gradient.rows = args.grad;
  plan.chunk = std::max<int64_t>(1, ceil_div(bands(plan), most_chunks));
  const int64_t chunks = ceil_div(bands(plan), plan.chunk), length = ceil_div(s.k, panel) * panel * taps(s);
  const Buffer partial(static_cast<size_t>(chunks * length) * sizeof(double));
  plan.partial = partial.get<double>();
  parallel(chunks, kernels().stem_wgrad_scratch(plan),
           [&](int64_t begin, int64_t end, void* scratch) { kernels().stem_wgrad(plan, begin, end, scratch); });
  with_storage(args.dtype, [&](auto value) {
    auto* to = static_cast<decltype(value)*>(args.dweight);
    parallel(s.k, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        visit_weights(s, args.weight, panel, k, [&](int64_t place, int64_t offset) {
          double sum = 0;
          for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += plan.partial[chunk * length + place];
          with_accumulation(args.dtype, [&](auto zero) {
            to[offset] = static_cast<decltype(value)>(static_cast<decltype(zero)>(sum));
          });
        });
    });
  });
}

}  // namespace slowfast_fast
