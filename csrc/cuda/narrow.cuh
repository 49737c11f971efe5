// Convolutions between 8 to 128 channels, forward and dgrad, on tensor cores and without tiles of activations in shared
// memory.
//
// A warp owns 16 rows of a product and slides along the frames. Every lane reads 16 bytes of its row at a time: four
// registers of adjacent channels, which are fragments of the left operand as they stand, because the product may sum
// over the depth in any order as long as both operands agree. Lane q of a quad of lanes brings registers 0 and 1 to one
// product and 2 and 3 to the next; the weight is brought to that order once per block. Each frame is read once and
// added to all outputs whose window holds it (`slots` of them are under way), so the taps cost registers, not reads.
//
// A row of the product is 64 bytes a step. Of 32 or 16 bytes of channels it holds 2 or 4 positions of a frame side by
// side; the weight is then block-diagonal, once for each position.
//
// The columns of the result are the output channels in an order in which a lane has adjacent ones.
#pragma once
#include "moments.cuh"
#include "narrow_weight.cuh"

namespace slowfast_fast::cuda::narrow {

constexpr int kRows = 16;  // of a product
constexpr int kAhead = 2;  // steps that are being read while as many are multiplied: 2 KB of a warp on their way
static_assert(kAhead == 2, "Warp::run chooses between two");

// Warps take items in turn: 16 * positions rows, and `outputs` of u.
struct Plan {
  int64_t row_tiles, items;
  int outputs, steps_in;  // steps for the channels of a frame
};

template <class T>
__device__ void multiply(float (&sum)[4], const Words (&x)[2], const Words& weight) {
#pragma unroll
  for (int s = 0; s < 4; s += 2) {
    const uint32_t a[] = {x[0].of[s], x[1].of[s], x[0].of[s + 1], x[1].of[s + 1]},
                   b[] = {weight.of[s], weight.of[s + 1]};
    if constexpr (std::is_same_v<T, float>) mma_tf32(sum, a, b);
    else mma<T>(sum, a, b);
  }
}

// The frame and channels of a step, and how far they are from the tap 0 of the newest output.
struct Cursor {
  int frame, phase, step;
};

// Vectors of the block's channels, one after another in shared memory.
enum Vector : int { kCentre, kScale, kShift, kResidualScale, kVectors };

template <class Shape>
__device__ void fill_vectors(const Conv& conv, int first_out, float* vectors) {
  const MaskedGradient& gradient = conv.gradient;
  const bool of_gradient = gradient.grad.data;
  for (int channel = threadIdx.x; channel < Shape::kOut; channel += kThreads) {
    const auto fill = [&](Vector vector, const void* from, float absent) {
      vectors[vector * Shape::kOut + channel] = channel_or(from, first_out + channel, absent);
    };
    fill(kCentre, of_gradient ? gradient.mean : conv.centre, 0.f);
    fill(kScale, of_gradient ? gradient.invstd : conv.scale, 1.f);
    fill(kShift, conv.shift, 0.f);
    fill(kResidualScale, conv.residual_scale, 1.f);
  }
}

template <class Shape>
class Warp {
  using T = typename Shape::T;
  static constexpr int kValues = Shape::kValues;

 public:
  // fragments and vectors (see fill_vectors) are in shared memory.
  __device__ Warp(const Conv& conv, const Plan& plan, int first_out, const T* fragments, const float* vectors)
      : conv_(conv),
        plan_(plan),
        fragments_(fragments),
        vectors_(vectors),
        lane_(threadIdx.x % kWarp),
        first_out_(first_out),
        span_(conv.taps < conv.stride ? conv.taps : conv.stride),
        last_phase_((conv.taps - 1) % conv.stride) {}

  __device__ int part() const { return lane_ % Shape::kParts; }

  // With `gathers`, also adds what it stores, or would have stored, to what is gathered.
  template <class Gathered>
  __device__ void run(int64_t item, bool gathers, Gathered& gathered) {
    const int64_t tile = item % plan_.row_tiles;
    for (int h = 0; h < 2; ++h) {
      const int64_t row = (tile * kRows + lane_ / 4 + 8 * h) * Shape::kPositions + lane_ % 4 / Shape::kParts;
      present_[h] = row < conv_.rows;
      clip_[h] = int(row / conv_.p);
      position_[h] = int(row % conv_.p);
      x_[h] = row_at<T>(conv_.x, {clip_[h], 0, position_[h]}) + part() * Pack<T>::kSize;
    }
    first_ = int(item / plan_.row_tiles) * plan_.outputs;
    output_ = first_;
    const int outputs = conv_.t_out - first_ < plan_.outputs ? conv_.t_out - first_ : plan_.outputs;
    const int overlap = conv_.taps - span_;
    const int steps = (outputs * span_ + overlap) * plan_.steps_in;

    for (auto& slot : sum_)
      for (auto& tile_sum : slot)
        for (float& value : tile_sum) value = 0;
    Cursor reading{first_ * conv_.stride - conv_.padding, 0, 0};
    phase_ = step_ = 0;
    Words next[kAhead][2];
    read(next, reading);
#pragma unroll 1
    for (int step = 0; step < steps; step += kAhead) {
      Words now[kAhead][2];
#pragma unroll
      for (int d = 0; d < kAhead; ++d)
        for (int h = 0; h < 2; ++h) now[d][h] = next[d][h];
      if (step + kAhead < steps) read(next, reading);
#pragma unroll 1  // one copy of the code for both
      for (int d = 0; d < kAhead && step + d < steps; ++d) {
        Words x[2];
        for (int h = 0; h < 2; ++h)
          for (int i = 0; i < 4; ++i) x[h].of[i] = d ? now[1][h].of[i] : now[0][h].of[i];
        add(x, gathers, gathered);
      }
    }
  }

 private:
  __device__ void read(Words (&to)[kAhead][2], Cursor& at) const {
#pragma unroll
    for (int d = 0; d < kAhead; ++d) {
      const bool inside = at.frame >= 0 && at.frame < conv_.t_in;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        to[d][h] = Words{};
        if (inside && present_[h]) to[d][h] = load16(x_[h] + at.frame * conv_.x.stride_t + at.step * Shape::kIn);
      }
      if (++at.step < plan_.steps_in) continue;
      at.step = 0;
      ++at.frame;
      if (++at.phase < span_) continue;
      at.phase = 0;
      at.frame += conv_.stride - span_;
    }
  }

  template <class Gathered>
  __device__ void add(Words (&x)[2], bool gathers, Gathered& gathered) {
    if constexpr (std::is_same_v<T, float>)
      for (Words& words : x) round_to_tf32(words.of);
#pragma unroll
    for (int slot = 0; slot < Shape::kSlots; ++slot) {
      const int tap = phase_ + slot * conv_.stride;
      if (tap >= conv_.taps) break;
      using At = Fragments<Shape>;
      const T* weight = fragments_ + (tap * plan_.steps_in + step_) * At::kOfStep + lane_ * At::kSize;
#pragma unroll
      for (int tile = 0; tile < Shape::kTiles; ++tile)
        multiply<T>(sum_[slot][tile], x, load16(weight + tile * At::kOfTile));
    }
    if (++step_ < plan_.steps_in) return;
    step_ = 0;
    const int finished = output_ - (Shape::kSlots - 1);
    if (phase_ == last_phase_ && finished >= first_) finish(finished, gathers, gathered);
    if (++phase_ < span_) return;
    phase_ = 0;
    ++output_;
#pragma unroll
    for (int slot = Shape::kSlots - 1; slot >= 0; --slot)
#pragma unroll
      for (int tile = 0; tile < Shape::kTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum_[slot][tile][i] = slot ? sum_[slot ? slot - 1 : 0][tile][i] : 0;
  }

  template <class Gathered>
  __device__ void finish(int output, bool gathers, Gathered& gathered) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!present_[h]) continue;
      const Position at{clip_[h], conv_.first_out + int64_t(output) * conv_.step_out, position_[h]};
      float sums[kValues];
#pragma unroll
      for (int v = 0; v < kValues; ++v) sums[v] = sum_[Shape::kSlots - 1][v / 2][2 * h + v % 2];
      finish_row(at, sums, gathers, gathered);
    }
  }

  __device__ void finish_row(const Position& at, const float (&sums)[kValues], bool gathers,
                             RunningMoments<kValues>& moments) const {
    const float *centre = vector(kCentre), *scale = vector(kScale), *shift = vector(kShift),
                *residual_scale = vector(kResidualScale);
    T values[kValues], residual[kValues];
    if (conv_.residual.data) load_values(residual, row_at<T>(conv_.residual, at) + channel());
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      float y = fma(sums[v] - centre[v], scale[v], shift[v]);
      if (conv_.residual.data) y = fma(float(residual[v]), residual_scale[v], y);
      values[v] = T(conv_.relu ? relu(y) : y);
    }
    if (conv_.y.data) store_values(values, row_at<T>(conv_.y, at) + channel());
    if (!gathers) return;
    if (conv_.y.data) moments.add(values);
    else moments.add(sums);
  }

  __device__ void finish_row(const Position& at, const float (&sums)[kValues], bool,
                             RunningGradientSums<kValues>& gradient) const {
    GradientPack<T, kValues> of_row;
    of_row.load(conv_.gradient, at, channel());
    of_row.finish(conv_.gradient, at, channel());
    gradient.add(of_row.g, sums, vector(kCentre), vector(kScale));
  }

  // Of the lane's channels: the first of them, and what fill_vectors left for them.
  __device__ int64_t channel() const { return first_out_ + part() * kValues; }
  __device__ const float* vector(int number) const { return vectors_ + number * Shape::kOut + part() * kValues; }

  const Conv& conv_;
  const Plan& plan_;
  const T* fragments_;
  const float* vectors_;
  int lane_, first_out_, span_, last_phase_;
  bool present_[2];
  int clip_[2], position_[2];
  const T* x_[2];
  int first_, output_;  // the item's first output, and the newest one under way
  int phase_, step_;
  float sum_[Shape::kSlots][Shape::kTiles][4];  // [slot] of output_ - slot
};

// What the lane whose number differs in the bit `mask` has.
__device__ inline Moments<float> other_lane(const Moments<float>& mine, int mask) {
  return {__shfl_xor_sync(kAllLanes, mine.count, mask), __shfl_xor_sync(kAllLanes, mine.mean, mask),
          __shfl_xor_sync(kAllLanes, mine.m2, mask)};
}
__device__ inline GradientSum<float> other_lane(const GradientSum<float>& mine, int mask) {
  return {__shfl_xor_sync(kAllLanes, mine.sum, mask), __shfl_xor_sync(kAllLanes, mine.sum_xhat, mask)};
}

// What a block gathered of its channels from what its lanes did, to partial[channel] of its first one.
template <class Shape, class Running, class Value>
__device__ void merge_lanes(const Running& running, Value* partial) {
  const int lane = threadIdx.x % kWarp;
  auto& shared = *reinterpret_cast<Value(*)[kWarps][Shape::kOut]>(&shared_memory<Words>());
  __syncthreads();  // before what the warps were reading there is overwritten
#pragma unroll
  for (int v = 0; v < Shape::kValues; ++v) {
    Value value = running.of(v);
#pragma unroll
    for (int mask = int(kWarp) / 2; mask >= Shape::kParts; mask /= 2) value.merge(other_lane(value, mask));
    if (lane < Shape::kParts) shared[threadIdx.x / kWarp][lane * Shape::kValues + v] = value;
  }
  __syncthreads();
  if (int(threadIdx.x) >= Shape::kOut) return;
  Value value = shared[0][threadIdx.x];
  for (int warp = 1; warp < kWarps; ++warp) value.merge(shared[warp][threadIdx.x]);
  partial[threadIdx.x] = value;
}

// What a lane gathers for a block to leave as values of this type.
template <class Value, int values>
using Running =
    std::conditional_t<std::is_same_v<Value, Moments<float>>, RunningMoments<values>, RunningGradientSums<values>>;

// Block (x, y): items in turn, and the y-th kOut output channels. With `partial`, (gridDim.x, out), for which it must
// have been compiled to gather, it leaves the moments of what it stored, or the sums of conv.gradient.
template <class Shape, bool kGathers, class Value>
__global__ void __launch_bounds__(kThreads, Shape::kBlocksPerSM(kGathers))
    narrow_kernel(Conv conv, Plan plan, Value* partial) {
  using T = typename Shape::T;
  const int first_out = blockIdx.y * Shape::kOut;
  auto* vectors = reinterpret_cast<float*>(&shared_memory<Words>());
  auto* fragments = reinterpret_cast<T*>(vectors + kVectors * Shape::kOut);
  fill_vectors<Shape>(conv, first_out, vectors);
  gather_weight<Shape>(conv, plan.steps_in, first_out, fragments);
  __syncthreads();

  Warp<Shape> warp(conv, plan, first_out, fragments, vectors);
  Running<Value, Shape::kValues> running;
  for (int64_t item = blockIdx.x * kWarps + threadIdx.x / kWarp; item < plan.items; item += gridDim.x * kWarps)
    warp.run(item, kGathers && partial, running);
  if (kGathers && partial) merge_lanes<Shape>(running, partial + int64_t(blockIdx.x) * conv.out + first_out);
}

}  // namespace slowfast_fast::cuda::narrow
