// wgrad between 8 to 128 channels: dW[k][tap][c] = sum over rows of gradient[row][k] * x[row under tap][c], on tensor
// cores or, for exact float32, on FMA, with both operands read about once.
//
// A step is one frame of the gradient, at some positions of it, with the frames of x that its windows hold. A block
// takes steps that follow each other in time, so that most of a window is that of the step before: frames of x wait in
// a ring in shared memory, where every tap finds them. Asynchronous copies are kAheadSteps steps ahead.
//
// ReLU and BatchNorm are undone on the way: where the gradient of the convolution's output is not what is given, each
// thread forms it, in shared memory, from the chunks that it copied itself; and leaves it in memory for dgrad.
//
// The depth of the product is a position, as its rows lie in memory. Its other two indices are counted in octets of
// channels, the sides of the matrices that ldmatrix transposes: those of x under each tap, two to a fragment of 16
// rows, and those of the gradient. The sums of all taps stay in the registers of one block from its first step to its
// last.
#pragma once
#include "narrow_wgrad_octets.cuh"
#include "narrow_wgrad_steps.cuh"

namespace slowfast_fast::cuda::narrow {

// What a warp holds: `pairs` of octets of x times `octets` of the gradient. Math: TensorOctets or FmaOctets.
template <class Math_, int pairs, int octets>
struct WgradShape {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr int kPairs = pairs, kOctets = octets;
  static constexpr int kValues = pairs * octets * 4;  // sums of a lane
  static constexpr int kBlocksPerSM = kValues * (1 + Math::kSumsSteps) < 96 ? 3 : 2;
  static_assert(octets % 2 == 0);
};

// A warp's share of the result and of the positions.
template <class Shape>
class WgradWarp {
  using T = typename Shape::T;
  using Math = typename Shape::Math;
  using Sums = WgradSums<Shape::kPairs, Shape::kOctets>;

 public:
  __device__ WgradWarp(const ConvShape& s, const WgradPlan& plan, const WgradMemory<T>& memory)
      : plan_(plan),
        memory_(memory),
        octets_in_(int(s.c) / kOctet),
        last_in_(int(s.kt) * octets_in_ - 1),
        pitch_in_(pitch_of<T>(octets_in_)),
        pitch_(pitch_of<T>(plan.slice_octets)) {
    const int warp = int(threadIdx.x / kWarp), results = plan.pair_warps * plan.octet_warps;
    depth_warp_ = warp / results;
    depth_warps_ = kWgradWarps / results;
    first_in_ = warp % results % plan.pair_warps * 2 * Shape::kPairs;
    first_ = warp % results / plan.pair_warps * Shape::kOctets;
    constexpr int kOctetBytes = kOctet * int(sizeof(T));
#pragma unroll
    for (int pair = 0; pair < Shape::kPairs; ++pair)
#pragma unroll
      for (int i = 0; i < Math::kOwn; ++i) {
        // Past the last octet the last one again, for results that nobody asks for.
        const int own = first_in_ + 2 * pair + Math::octet(i), octet = own < last_in_ ? own : last_in_;
        in_[pair][i] = (octet / octets_in_ << kTapBit) + octet % octets_in_ * kOctetBytes + Math::offset_in(pitch_in_);
      }
#pragma unroll
    for (int pair = 0; pair < Shape::kOctets / 2; ++pair)
#pragma unroll
      for (int i = 0; i < Math::kOwn; ++i) {
        const int own = first_ + 2 * pair + Math::octet(i), last = plan.slice_octets - 1;
        out_[pair][i] = (own < last ? own : last) * kOctetBytes + Math::offset_out(pitch_);
      }
    clear(sums_);
  }

  __device__ void multiply(const StepCursor& step) {
    int in[Shape::kPairs][Math::kOwn];
#pragma unroll
    for (int pair = 0; pair < Shape::kPairs; ++pair)
#pragma unroll
      for (int i = 0; i < Math::kOwn; ++i) {
        int slot = step.slot + (in_[pair][i] >> kTapBit);
        if (slot >= plan_.ring) slot -= plan_.ring;
        in[pair][i] = slot * memory_.x_bytes + (in_[pair][i] & kOffsetMask);
      }
    if constexpr (Math::kSumsSteps) {
      Sums sums;
      clear(sums);
      multiply(sums, step, in);
#pragma unroll
      for (int pair = 0; pair < Shape::kPairs; ++pair)
#pragma unroll
        for (int octet = 0; octet < Shape::kOctets; ++octet)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums_[pair][octet][i] += sums[pair][octet][i];
    } else {
      multiply(sums_, step, in);
    }
  }

  // Adds what the warps have that share a result, in their order, and leaves the sums in partial[k][tap][c] of the
  // slice's channels. All threads take part, when the copies and what is read of them are over.
  __device__ void leave(const ConvShape& s, int channels, float* partial) {
    auto* shared = reinterpret_cast<float*>(&shared_memory<Words>());
    const int lane = int(threadIdx.x % kWarp), results = plan_.pair_warps * plan_.octet_warps;
    const auto place = [&](int depth_warp, int value) -> float& {
      const int warp = int(threadIdx.x / kWarp) % results + (depth_warp - 1) * results;
      return shared[(warp * Shape::kValues + value) * int(kWarp) + lane];
    };
    __syncthreads();
    if (depth_warp_ > 0) each([&](int value, float& sum, int, int) { place(depth_warp_, value) = sum; });
    __syncthreads();
    if (depth_warp_ > 0) return;
    for (int warp = 1; warp < depth_warps_; ++warp)
      each([&](int value, float& sum, int, int) { sum += place(warp, value); });
    each([&](int, float& sum, int octet_in, int k) {
      if (octet_in <= last_in_ && k < channels)
        partial[(int64_t(k) * s.kt * octets_in_ + octet_in) * kOctet + lane / 4] = sum;
    });
  }

 private:
  static constexpr int kTapBit = 16, kOffsetMask = (1 << kTapBit) - 1;

  __device__ static void clear(Sums& sums) {
#pragma unroll
    for (auto& of_pair : sums)
#pragma unroll
      for (auto& product : of_pair)
#pragma unroll
        for (float& sum : product) sum = 0;
  }

  __device__ void multiply(Sums& sums, const StepCursor& step, const int (&in)[Shape::kPairs][Math::kOwn]) const {
    constexpr int kAtOnce = kPositionsAtOnce<T>;
    const unsigned char* gradient = memory_.gradient(plan_, step.buffer, false);
#pragma unroll 1
    for (int position = depth_warp_ * kAtOnce; position < plan_.positions; position += depth_warps_ * kAtOnce)
      Math::template multiply<Shape::kPairs, Shape::kOctets>(sums, memory_.ring + position * pitch_in_, in, pitch_in_,
                                                             gradient + position * pitch_, out_, pitch_);
  }

  // Calls f(number, sum, octet of x under a tap, channel of the slice) for the lane's sums.
  template <class F>
  __device__ void each(const F& f) {
#pragma unroll
    for (int pair = 0; pair < Shape::kPairs; ++pair)
#pragma unroll
      for (int octet = 0; octet < Shape::kOctets; ++octet)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          f((pair * Shape::kOctets + octet) * 4 + i, sums_[pair][octet][i], first_in_ + 2 * pair + i / 2,
            (first_ + octet) * kOctet + int(threadIdx.x) % 4 * 2 + i % 2);
  }

  const WgradPlan& plan_;
  const WgradMemory<T>& memory_;
  int octets_in_, last_in_, pitch_in_, pitch_;
  int depth_warp_, depth_warps_;
  int first_in_, first_;  // octets of this warp
  int in_[Shape::kPairs][Math::kOwn], out_[Shape::kOctets / 2][Math::kOwn];
  Sums sums_;
};

// partial[chunk][k][tap * C + c], as launch_merge_wgrad takes it. Block x: a chunk of steps and a slice of the
// channels, slices next to each other, so that x comes from L2 for all but one. gradient: where that of the
// convolution's output goes, if anywhere.
template <class Shape>
__global__ void __launch_bounds__(kWgradThreads, Shape::kBlocksPerSM)
    narrow_wgrad_kernel(ConvBackward args, const float* sum, const float* sum_xhat, OutRows gradient, WgradPlan plan,
                        float* partial) {
  using T = typename Shape::T;
  const ConvShape& s = args.shape;
  const int64_t chunk = int(blockIdx.x) / plan.slices, end = plan.steps.end(chunk);
  const int first_k = int(blockIdx.x) % plan.slices * plan.slice_octets * kOctet;
  const WgradMemory<T> memory(plan, int(s.c) / kOctet);
  if (plan.forms)
    for (int channel = int(threadIdx.x); channel < plan.slice_octets * kOctet; channel += kWgradThreads)
      memory.table[channel] = ChannelGradient::of(args, sum, sum_xhat, first_k + channel);
  __syncthreads();

  const WgradLoader<T> loader(args, plan, memory, first_k);
  WgradWarp<Shape> warp(s, plan, memory);
  StepCursor loading = StepCursor::first(plan.steps.begin(chunk), s.t_out), step = loading;
  const auto load = [&](int64_t number) {
    if (number < end) {
      loader.load(loading);
      loading.advance(s, plan);
    }
    cp_async_commit();  // a group even if empty, so that the newest ones can be counted
  };
  for (int i = 0; i < kAheadSteps; ++i) load(plan.steps.begin(chunk) + i);
  for (int64_t number = plan.steps.begin(chunk); number < end; ++number) {
    cp_async_wait<kAheadSteps - 1>();
    if (plan.forms) loader.form(step, gradient);
    __syncthreads();  // the step is there, and nobody reads what the next copies overwrite
    load(number + kAheadSteps);
    warp.multiply(step);
    step.advance(s, plan);
  }
  warp.leave(s, plan.slice_octets * kOctet, partial + (chunk * s.k + first_k) * s.kt * s.c);
}

}  // namespace slowfast_fast::cuda::narrow
