#include "../bottleneck.h"

#include <algorithm>
#include <deque>
#include <vector>

#include "device.h"
#include "support.h"

namespace slowfast_fast {
namespace {

using namespace cpu;

// Values of all weights from which packing them takes longer than calling a second thread.
constexpr int64_t worth_a_team = 32 << 10;

// Weights (out, in, taps), contiguous, as the kernels read them: [panel][tap][in][channel of the panel], zero-padded.
class PackedWeights {
 public:
  explicit PackedWeights(Dtype dtype) : dtype_(dtype) {}

  // Where the weight will be after run(); nullptr without one.
  const void* add(int64_t out, int64_t in, int64_t taps, const void* from) {
    if (!from) return nullptr;
    const int64_t panel = kernels().tile(dtype_, out).panel, values = ceil_div(out, panel) * panel * in * taps;
    buffers_.emplace_back(static_cast<size_t>(values) * acc_size(dtype_));
    values_ += values;
    void* to = buffers_.back().get();
    plans_.push_back({dtype_, out, in, taps, in * taps, taps, 1, panel, in, false, false, from, nullptr, to});
    scratch_ = std::max(scratch_, kernels().pack_scratch(plans_.back()));
    return to;
  }

  void run() const {
    int64_t panels = 0;
    for (const PackPlan& plan : plans_) panels += ceil_div(plan.out, plan.panel);
    const auto pack = [&](int64_t begin, int64_t end, void* scratch) {
      for (const PackPlan& plan : plans_) {
        const int64_t count = ceil_div(plan.out, plan.panel);
        if (begin < count && end > 0) kernels().pack(plan, std::max<int64_t>(begin, 0), std::min(end, count), scratch);
        begin -= count;
        end -= count;
      }
    };
    if (values_ >= worth_a_team) parallel(panels, scratch_, pack);
    else pack(0, panels, Buffer(static_cast<size_t>(scratch_)).get());
  }

 private:
  Dtype dtype_;
  std::deque<Buffer> buffers_;  // which stay where they are
  std::vector<PackPlan> plans_;
  int64_t values_ = 0, scratch_ = 0;
};

// What a task keeps of a and b: half of an L2 cache of 512 KiB. x, and x around its frames, may come from L3.
constexpr int64_t band_bytes = 256 << 10;
// Tasks that there should be, so that any small number of threads gets even shares.
constexpr int64_t least_tasks = 16;

// Whole images where they fit, because a band computes a for the rows above and below it as well; then as many frames
// as fit, which meet each panel of weights together.
void choose_band(BottleneckPlan& plan) {
  const Bottleneck& s = plan.block;
  const int64_t size = static_cast<int64_t>(acc_size(s.dtype));
  const auto bytes = [&](int64_t frames, int64_t rows) {
    return frames * rows * s.j * size * (s.stride * (s.w + 2 * s.dilation) + plan.w_out);
  };
  plan.rows = plan.h_out;
  while (plan.rows > 1 && bytes(1, plan.rows) > band_bytes) plan.rows = ceil_div(plan.rows, 2);
  const int64_t bands = s.n * ceil_div(plan.h_out, plan.rows);
  plan.frames = 1;
  while (plan.frames < s.t && bytes(plan.frames + 1, plan.rows) <= band_bytes &&
         bands * ceil_div(s.t, plan.frames + 1) >= least_tasks)
    ++plan.frames;
}

}  // namespace

void Cpu::bottleneck(const Bottleneck& args) {
  const Bottleneck& s = args;
  if (s.n == 0) return;
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
  PackedWeights packed(s.dtype);
  plan.weight_a = packed.add(s.j, s.c, s.kt, s.weight_a);
  plan.weight_b = packed.add(s.j, s.j, 9, s.weight_b);
  plan.weight_c = packed.add(s.k, s.j, 1, s.weight_c);
  plan.weight_shortcut = packed.add(s.k, s.c, 1, s.weight_shortcut);
  packed.run();
  plan.shift_a = shift_a.get();
  plan.shift_b = shift_b.get();
  plan.shift_c = shift_c.get();
  choose_band(plan);
  parallel(s.n * ceil_div(s.t, plan.frames) * ceil_div(plan.h_out, plan.rows), kernels().bottleneck_scratch(plan),
           [&](int64_t begin, int64_t end, void* scratch) { kernels().bottleneck(plan, begin, end, scratch); });
}

}  // namespace slowfast_fast

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast, CPU, m) { slowfast_fast::register_bottleneck<slowfast_fast::Cpu>(m); }
