// What narrow_wgrad.cuh has in shared memory, and the loader that brings its steps there: tables, frames of the
// gradient and a ring of frames of x, in octets of channels.
#pragma once
#include "gradient.cuh"

namespace slowfast_fast::cuda::narrow {

constexpr int kWgradThreads = 128, kWgradWarps = kWgradThreads / int(kWarp);
constexpr int kOctet = 8;
constexpr int kAheadSteps = 2;

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

}  // namespace slowfast_fast::cuda::narrow
