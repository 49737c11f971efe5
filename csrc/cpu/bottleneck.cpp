#include "../bottleneck.h"

#include "device.h"
#include "support.h"

namespace slowfast_fast {
namespace {

using namespace cpu;

// A weight (out, in, taps), contiguous, as the kernels read it: [panel][tap][in][channel of the panel], zero-padded.
class PackedWeight {
 public:
  PackedWeight(Dtype dtype, int64_t out, int64_t in, int64_t taps, const void* from)
      : buffer_(static_cast<size_t>(from ? padded(dtype, out) * in * taps : 0) * acc_size(dtype)) {
    if (!from) return;
    const int64_t panel = kernels().tile(dtype, out).panel;
    const PackPlan plan{dtype, out, in, taps, in * taps, taps, panel, in, false, false, from, nullptr, buffer_.get()};
    parallel(ceil_div(out, panel), kernels().pack_scratch(plan),
             [&](int64_t begin, int64_t end, void* scratch) { kernels().pack(plan, begin, end, scratch); });
  }
  const void* get() const { return buffer_.get(); }

 private:
  static int64_t padded(Dtype dtype, int64_t out) {
    const int64_t panel = kernels().tile(dtype, out).panel;
    return ceil_div(out, panel) * panel;
  }
  Buffer buffer_;
};

// What a task reads and keeps should lie in an L2 cache of 512 KiB: its frames of x with those around them, a and b.
constexpr int64_t band_bytes = 320 << 10;
// A band's a is computed for dilation rows above and below it as well, so bands are not low.
constexpr int64_t least_rows = 7;

void choose_band(BottleneckPlan& plan) {
  const Bottleneck& s = plan.block;
  const int64_t size = static_cast<int64_t>(acc_size(s.dtype));
  const auto bytes = [&](int64_t frames, int64_t rows) {
    const int64_t x = (frames + s.kt - 1) * s.c, inner = frames * 2 * s.j;
    return (x + inner) * rows * s.stride * s.w * size;
  };
  plan.rows = plan.h_out;
  while (plan.rows > least_rows && bytes(1, plan.rows) > band_bytes) plan.rows = ceil_div(plan.rows, 2);
  plan.frames = 1;
  while (plan.frames < s.t && bytes(plan.frames + 1, plan.rows) <= band_bytes) ++plan.frames;
}

}  // namespace

void Cpu::bottleneck(const Bottleneck& args) {
  const Bottleneck& s = args;
  if (s.n == 0) return;
  const PackedWeight weight_a(s.dtype, s.j, s.c, s.kt, s.weight_a), weight_b(s.dtype, s.j, s.j, 9, s.weight_b);
  const PackedWeight weight_c(s.dtype, s.k, s.j, 1, s.weight_c), shortcut(s.dtype, s.k, s.c, 1, s.weight_shortcut);
  const PaddedVector shift_a(s.dtype, s.j, s.shift_a, 0), shift_b(s.dtype, s.j, s.shift_b, 0);
  const PaddedVector shift_c(s.dtype, s.k, s.shift_c, 0);
  if (s.shift_shortcut)
    with_accumulation(s.dtype, [&](auto zero) {
      using A = decltype(zero);
      for (int64_t k = 0; k < s.k; ++k) shift_c.get<A>()[k] += static_cast<const A*>(s.shift_shortcut)[k];
    });
  BottleneckPlan plan{};
  plan.block = s;
  plan.h_out = s.h_out();
  plan.w_out = s.w_out();
  plan.weight_a = weight_a.get();
  plan.weight_b = weight_b.get();
  plan.weight_c = weight_c.get();
  plan.weight_shortcut = s.weight_shortcut ? shortcut.get() : nullptr;
  plan.shift_a = shift_a.get();
  plan.shift_b = shift_b.get();
  plan.shift_c = shift_c.get();
  choose_band(plan);
  parallel(s.n * ceil_div(s.t, plan.frames) * ceil_div(plan.h_out, plan.rows), kernels().bottleneck_scratch(plan),
           [&](int64_t begin, int64_t end, void* scratch) { kernels().bottleneck(plan, begin, end, scratch); });
}

}  // namespace slowfast_fast

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast, CPU, m) { slowfast_fast::register_bottleneck<slowfast_fast::Cpu>(m); }
