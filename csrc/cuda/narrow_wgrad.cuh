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
#include "gradient.cuh"

namespace slowfast_fast::cuda::narrow {

constexpr int kWgradThreads = 128, kWgradWarps = kWgradThreads / int(kWarp);
constexpr int kOctet = 8;
constexpr int kAheadSteps = 2;

template <class T>
constexpr int kPositionsAtOnce = 32 / int(sizeof(T));  // of a product

// What a lane holds of a product of pairs of octets of x with octets of the gradient: see WgradWarp::each.
template <int pairs, int octets>
using WgradSums = float[pairs][octets][4];

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

struct WgradPlan {
  int positions;                // of a step
  Chunks steps;                 // (tile of positions, frame of the gradient): a chunk for each block
  int slices, slice_octets;     // of the gradient's channels: other blocks, which read x once more
  int pair_warps, octet_warps;  // that share the result; the others share the positions
  int span, ring;               // frames of x that a step adds, and that there is room for
  bool forms;                   // the gradient, of two tensors
};

// Rows in shared memory are an odd number of octets apart, so that neither ldmatrix nor reading TF32 word by word finds
// two of its rows in the same banks.
template <class T>
__host__ __device__ constexpr int pitch_of(int octets) {
  return (octets | 1) * kOctet * int(sizeof(T));
}

// Where a step is, and where in shared memory.
struct StepCursor {
  int tile, t;
  int buffer;  // of the gradient
  int slot;    // of the ring: the frame under tap 0. The next taps' follow.
  bool fresh;  // the window shares nothing with the step before

  __device__ static StepCursor first(int64_t step, int64_t t_out) {
    return {int(step / t_out), int(step % t_out), 0, 0, true};
  }

  __device__ void advance(const ConvShape& s, const WgradPlan& plan) {
    fresh = ++t == int(s.t_out);
    if (fresh) {
      t = 0;
      ++tile;
    }
    buffer = buffer == kAheadSteps ? 0 : buffer + 1;
    slot += fresh ? int(s.kt) : plan.span;
    if (slot >= plan.ring) slot -= plan.ring;
  }
};

// A thread's share of a frame: one chunk of 16 bytes at every lanes-th position.
template <class T>
struct FrameShare {
  int chunk, first, lanes, pitch;

  __device__ explicit FrameShare(int octets) : pitch(pitch_of<T>(octets)) {
    const int chunks = octets * kOctet / Pack<T>::kSize;
    chunk = int(threadIdx.x) % chunks;
    first = int(threadIdx.x) / chunks;
    lanes = kWgradThreads / chunks;
  }

  __device__ int channel() const { return chunk * Pack<T>::kSize; }

  // Calls f(bytes from the frame's begin in shared memory, clip and position, whether they exist).
  template <class F>
  __device__ void walk(const ConvShape& s, const WgradPlan& plan, int tile, const F& f) const {
    if (first >= lanes) return;
    const int rows = int(s.n * s.p), begin = tile * plan.positions, p = int(s.p);
    int clip = (begin + first) / p, position = (begin + first) % p;
    for (int i = first; i < plan.positions; i += lanes) {
      f(i * pitch + chunk * int(sizeof(Words)), Position{clip, 0, position}, begin + i < rows);
      for (position += lanes; position >= p; position -= p) ++clip;
    }
  }
};

// What a block has in shared memory: a table of its channels, the gradient's frames (each with the one beside it, where
// it has to be formed), and the ring of frames of x.
template <class T>
struct WgradMemory {
  ChannelGradient* table;
  unsigned char *gradients, *ring;
  int gradient_bytes, x_bytes;  // of a frame

  static __host__ __device__ int table_bytes(const WgradPlan& plan) {
    return plan.forms ? plan.slice_octets * kOctet * int(sizeof(ChannelGradient)) : 0;
  }
  static __host__ __device__ int gradients_bytes(const WgradPlan& plan) {
    return (kAheadSteps + 1) * (1 + plan.forms) * plan.positions * pitch_of<T>(plan.slice_octets);
  }
  static __host__ __device__ int ring_bytes(const WgradPlan& plan, int octets_in) {
    return plan.ring * plan.positions * pitch_of<T>(octets_in);
  }

  __device__ WgradMemory(const WgradPlan& plan, int octets_in)
      : table(reinterpret_cast<ChannelGradient*>(&shared_memory<Words>())),
        gradients(reinterpret_cast<unsigned char*>(table) + table_bytes(plan)),
        ring(gradients + gradients_bytes(plan)),
        gradient_bytes(plan.positions * pitch_of<T>(plan.slice_octets)),
        x_bytes(plan.positions * pitch_of<T>(octets_in)) {}

  // `beside`: of the tensor that is read beside the gradient.
  __device__ unsigned char* gradient(const WgradPlan& plan, int buffer, bool beside) const {
    return gradients + (buffer * (1 + plan.forms) + beside) * gradient_bytes;
  }
};

// Brings a block's steps to shared memory and forms the gradient there.
template <class T>
class WgradLoader {
 public:
  __device__ WgradLoader(const ConvBackward& args, const WgradPlan& plan, const WgradMemory<T>& memory, int first_k)
      : args_(args),
        plan_(plan),
        memory_(memory),
        x_(int(args.shape.c) / kOctet),
        gradient_(plan.slice_octets),
        channel_(first_k + gradient_.channel()) {}

  __device__ void load(const StepCursor& step) const {
    const ConvShape& s = args_.shape;
    copy(memory_.gradient(plan_, step.buffer, false), gradient_, args_.grad, step, step.t, true, channel_);
    if (plan_.forms)
      copy(memory_.gradient(plan_, step.buffer, true), gradient_, beside_gradient(args_), step, step.t, true, channel_);
    for (int tap = step.fresh ? 0 : int(s.kt) - plan_.span; tap < s.kt; ++tap) {
      const int frame = step.t * int(s.stride) - int(s.padding) + tap;
      const int slot = step.slot + tap < plan_.ring ? step.slot + tap : step.slot + tap - plan_.ring;
      copy(memory_.ring + slot * memory_.x_bytes, x_, args_.x, step, frame, frame >= 0 && frame < s.t_in, x_.channel());
    }
  }

  // Of the chunks that this thread copied, which must have arrived. Rows that do not exist stay 0.
  __device__ void form(const StepCursor& step, const OutRows& out) const {
    ChannelGradient channels[Pack<T>::kSize];
#pragma unroll
    for (int e = 0; e < Pack<T>::kSize; ++e) channels[e] = memory_.table[gradient_.channel() + e];
    unsigned char *grads = memory_.gradient(plan_, step.buffer, false),
                  *besides = memory_.gradient(plan_, step.buffer, true);
    gradient_.walk(args_.shape, plan_, step.tile, [&](int offset, Position at, bool exists) {
      if (!exists) return;
      Pack<T> grad, beside;
      Words words;
      grad.load(reinterpret_cast<const T*>(grads + offset));
      beside.load(reinterpret_cast<const T*>(besides + offset));
      form_gradient(args_, channels, grad, beside, beside);
      memcpy(&words, &grad, sizeof words);
      *reinterpret_cast<Words*>(grads + offset) = words;
      at.t = step.t;
      if (out.data) grad.store(row_at<T>(out, at) + channel_);
    });
  }

 private:
  __device__ void copy(unsigned char* to, const FrameShare<T>& share, const Rows& from, const StepCursor& step,
                       int frame, bool inside, int channel) const {
    share.walk(args_.shape, plan_, step.tile, [&](int offset, Position at, bool exists) {
      at.t = frame;
      const bool present = exists && inside;
      cp_async16(to + offset, present ? row_at<T>(from, at) + channel : from.data, present);
    });
  }

  const ConvBackward& args_;
  const WgradPlan& plan_;
  const WgradMemory<T>& memory_;
  FrameShare<T> x_, gradient_;
  int channel_;  // of the tensor
};

// How a warp's products are made: on tensor cores. Where a lane finds its share of two octets at kPositionsAtOnce
// positions, as fragments whose rows are channels: r[0] and r[1] are the first half of the positions of octets 0 and 1,
// r[2] and r[3] the second. ldmatrix wants an address in one of them, 4-byte elements are read from both.
// kSumsSteps: each step has sums of its own, which bounds the rounding error of long ones.
template <class T_>
struct TensorOctets {
  using T = T_;
  static constexpr bool kSumsSteps = false;
  static constexpr int kOwn = sizeof(T) == 2 ? 1 : 2;

  // Which of the two the lane's i-th address lies in, and how far from the octet's begin.
  __device__ static int octet(int i) { return kOwn == 2 ? i : int(threadIdx.x) / 8 % 2; }
  __device__ static int offset_in(int pitch) {
    const int lane = int(threadIdx.x) % int(kWarp);
    return kOwn == 2 ? lane % 4 * pitch + lane / 4 * 4 : (lane % 8 + lane / 16 * 8) * pitch;
  }
  __device__ static int offset_out(int pitch) { return offset_in(pitch); }

  // Adds the products of rows from x and gradient on, which are a pitch apart; in and out: the lane's addresses there.
  template <int pairs, int octets>
  __device__ static void multiply(WgradSums<pairs, octets>& sums, const unsigned char* x, const int (&in)[pairs][kOwn],
                                  int pitch_in, const unsigned char* gradient, const int (&out)[octets / 2][kOwn],
                                  int pitch) {
    uint32_t right[octets / 2][4];
#pragma unroll
    for (int pair = 0; pair < octets / 2; ++pair) read(right[pair], gradient, out[pair], pitch);
#pragma unroll
    for (int pair = 0; pair < pairs; ++pair) {
      uint32_t left[4];
      read(left, x, in[pair], pitch_in);
#pragma unroll
      for (int octet = 0; octet < octets; ++octet) {
        const uint32_t column[2] = {right[octet / 2][octet % 2], right[octet / 2][octet % 2 + 2]};
        if constexpr (sizeof(T) == 4) mma_tf32(sums[pair][octet], left, column);
        else mma<T>(sums[pair][octet], left, column);
      }
    }
  }

 private:
  __device__ static void read(uint32_t (&r)[4], const unsigned char* base, const int (&offset)[kOwn], int pitch) {
    if constexpr (kOwn == 1) {
      ldmatrix_x4_trans(r, base + offset[0]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = *reinterpret_cast<const uint32_t*>(base + offset[i % 2] + i / 2 * 4 * pitch);
      round_to_tf32(r);
    }
  }
};

// ... or by FMA, with the sums in the same places: a lane has one channel of each octet of x, two of the gradient's.
struct FmaOctets {
  using T = float;
  static constexpr bool kSumsSteps = true;
  static constexpr int kOwn = 2;
  struct alignas(8) Two {
    float of[2];
  };

  __device__ static int octet(int i) { return i; }
  __device__ static int offset_in(int) { return int(threadIdx.x) % int(kWarp) / 4 * int(sizeof(float)); }
  __device__ static int offset_out(int) { return int(threadIdx.x) % 4 * int(sizeof(Two)); }

  template <int pairs, int octets>
  __device__ static void multiply(WgradSums<pairs, octets>& sums, const unsigned char* x, const int (&in)[pairs][kOwn],
                                  int pitch_in, const unsigned char* gradient, const int (&out)[octets / 2][kOwn],
                                  int pitch) {
#pragma unroll 2
    for (int position = 0; position < kPositionsAtOnce<T>; ++position, x += pitch_in, gradient += pitch) {
      Two right[octets];
#pragma unroll
      for (int octet = 0; octet < octets; ++octet)
        right[octet] = *reinterpret_cast<const Two*>(gradient + out[octet / 2][octet % 2]);
#pragma unroll
      for (int i = 0; i < 2 * pairs; ++i) {
        const float left = *reinterpret_cast<const float*>(x + in[i / 2][i % 2]);
#pragma unroll
        for (int octet = 0; octet < octets; ++octet) {
          float* sum = &sums[i / 2][octet][i % 2 * 2];
          sum[0] = fmaf(left, right[octet].of[0], sum[0]);
          sum[1] = fmaf(left, right[octet].of[1], sum[1]);
        }
      }
    }
  }
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
