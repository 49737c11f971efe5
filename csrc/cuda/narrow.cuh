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
#include "elementwise.cuh"
#include "moments.cuh"
#include "pack.cuh"

namespace slowfast_fast::cuda::narrow {

constexpr int kThreads = 128, kWarps = kThreads / int(kWarp);
constexpr int kRows = 16;  // of a product
constexpr int kAhead = 2;  // steps that are being read while as many are multiplied: 2 KB of a warp on their way
static_assert(kAhead == 2, "Warp::run chooses between two");

template <class T_, int positions, int tiles, int slots>
struct Shape {
  using T = T_;
  static constexpr int kPositions = positions;         // of a row of the product
  static constexpr int kTiles = tiles;                 // products of 8 columns
  static constexpr int kSlots = slots;                 // outputs under way
  static constexpr int kParts = 4 / positions;         // lanes of a quad that share a position
  static constexpr int kIn = kParts * Pack<T>::kSize;  // input channels of a step
  static constexpr int kValues = 2 * tiles;            // adjacent output channels of a lane
  static constexpr int kOut = kParts * kValues;        // output channels of a block
  // With this many sums a lane has no room for moments beside them if three blocks are to fit: kernels that gather none
  // are compiled apart.
  static constexpr bool kApart = tiles * (slots + 1) == 16;
  // Asked of the compiler, which else spills a register or two to make room for a third block of the widest.
  static constexpr int kBlocksPerSM(bool gathers) { return tiles * (slots + 1) < 16 || (kApart && !gathers) ? 3 : 2; }
};

// y[u] = sum over taps of weight[tap] * x[u * stride - padding + tap], frames outside the clip being 0; y[u] is frame
// first_out + u * step_out. The forward as it stands; dgrad is one such convolution for each residue of the frame by
// the stride.
struct Conv {
  int64_t rows, p;  // N * H * W
  int in, out;      // channels
  int t_in, t_out;  // frames of x, and u
  int taps, stride, padding;
  int first_out, step_out;
  Rows x;
  const void* weight;        // (K, C, kt) as the op has it
  const void* weight_scale;  // (K), or absent: a factor of the weight
  int kt;
  bool transposed;  // K are the input channels; tap i is then first_tap + (taps - 1 - i) * step_tap of kt
  int first_tap, step_tap;
  const void *scale, *shift;
  Rows residual;
  bool relu;
  OutRows y;
};

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

// Where an element of the weight stands among the fragments, [tap][step][tile][lane] of 16 bytes: the sum of three
// offsets. With several positions it stands there once for each of them.
template <class Shape>
struct Fragments {
  static constexpr int kSize = Pack<typename Shape::T>::kSize;
  static constexpr int kOfTile = int(kWarp) * kSize, kOfStep = Shape::kTiles * kOfTile;
  static constexpr int kOfPosition = (4 * 2 + 1) * Shape::kParts * kSize;  // its columns, and its lanes of a quad

  // channel: of the block's. Lane 4 * column + quad has a column of the weight and a quad's share of the depth.
  __device__ static int of_out(int channel) {
    const int column = 2 * (channel / Shape::kValues) + channel % 2;
    return channel % Shape::kValues / 2 * kOfTile + 4 * column * kSize;
  }
  __device__ static int of_in(int channel) {
    return channel / Shape::kIn * kOfStep +
           channel % Shape::kIn;  // a quad's share is a pack, so shares follow each other
  }
};

// Brings the weight to fragments, for outputs first_out to first_out + kOut.
template <class Shape>
__device__ void gather_weight(const Conv& conv, int steps_in, int first_out, typename Shape::T* fragments) {
  using T = typename Shape::T;
  using At = Fragments<Shape>;
  constexpr int kSize = At::kSize;
  const int of_tap = steps_in * At::kOfStep;
  for (int i = threadIdx.x * kSize; i < conv.taps * of_tap; i += kThreads * kSize)
    memset(fragments + i, 0, sizeof(Pack<T>));
  __syncthreads();

  const int inner = conv.transposed ? conv.out : conv.in, of_row = inner * conv.kt;
  const int begin = conv.transposed ? 0 : first_out * of_row,
            end = conv.transposed ? conv.in * of_row : begin + Shape::kOut * of_row;
  for (int i = begin + int(threadIdx.x) * kSize; i < end; i += kThreads * kSize) {
    Pack<T> pack;
    pack.load(static_cast<const T*>(conv.weight) + i);
    const int row = i / of_row;  // a pack lies in one, for the channels of a row are a multiple of it
    int column = i % of_row / conv.kt, j = i % conv.kt;
    const float factor = channel_or(conv.weight_scale, row, 1.f);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const int out = (conv.transposed ? column : row) - first_out, in = conv.transposed ? row : column;
      const int back = conv.transposed ? (j - conv.first_tap) / conv.step_tap : 0;
      const int tap = conv.transposed ? conv.taps - 1 - back : j;
      const bool of_residue = !conv.transposed || (j >= conv.first_tap && conv.first_tap + back * conv.step_tap == j);
      T value = T(factor * float(pack.of[e]));
      if constexpr (std::is_same_v<T, float>) {
        const uint32_t bits = to_tf32(value);
        memcpy(&value, &bits, sizeof value);
      }
      if (of_residue && out >= 0 && out < Shape::kOut) {
        T* to = fragments + tap * of_tap + At::of_in(in) + At::of_out(out);
#pragma unroll
        for (int position = 0; position < Shape::kPositions; ++position) to[position * At::kOfPosition] = value;
      }
      const bool carry = ++j == conv.kt;
      j = carry ? 0 : j;
      column += carry;
    }
  }
}

// The frame and channels of a step, and how far they are from the tap 0 of the newest output.
struct Cursor {
  int frame, phase, step;
};

template <class Shape>
class Warp {
  using T = typename Shape::T;
  static constexpr int kValues = Shape::kValues;

 public:
  // fragments and vectors (scale and shift of the block's channels) are in shared memory.
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

  // With `gathers`, also adds what it stores to the moments.
  __device__ void run(int64_t item, bool gathers, RunningMoments<kValues>& moments) {
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
        add(x, gathers, moments);
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

  __device__ void add(Words (&x)[2], bool gathers, RunningMoments<kValues>& moments) {
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
    if (phase_ == last_phase_ && finished >= first_) finish(finished, gathers, moments);
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

  __device__ void finish(int output, bool gathers, RunningMoments<kValues>& moments) const {
    const float *scale = vectors_ + part() * kValues, *shift = scale + Shape::kOut;
    const int64_t channel = first_out_ + part() * kValues;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!present_[h]) continue;
      const Position at{clip_[h], conv_.first_out + int64_t(output) * conv_.step_out, position_[h]};
      T values[kValues], residual[kValues];
      if (conv_.residual.data) load_values(residual, row_at<T>(conv_.residual, at) + channel);
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        float y = fma(sum_[Shape::kSlots - 1][v / 2][2 * h + v % 2], scale[v], shift[v]);
        if (conv_.residual.data) y += float(residual[v]);
        values[v] = T(conv_.relu ? relu(y) : y);
      }
      store_values(values, row_at<T>(conv_.y, at) + channel);
      if (gathers) moments.add(values);
    }
  }

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

// The moments of a block's channels from those of its lanes, to partial[channel] of its first one.
template <class Shape>
__device__ void merge_lanes(const RunningMoments<Shape::kValues>& of_lane, Moments<float>* partial) {
  const int lane = threadIdx.x % kWarp;
  auto& shared = *reinterpret_cast<Moments<float>(*)[kWarps][Shape::kOut]>(&shared_memory<Words>());
  __syncthreads();  // before what the warps were reading there is overwritten
#pragma unroll
  for (int v = 0; v < Shape::kValues; ++v) {
    Moments<float> moments = of_lane.of(v);
#pragma unroll
    for (int mask = int(kWarp) / 2; mask >= Shape::kParts; mask /= 2)
      moments.merge({__shfl_xor_sync(kAllLanes, moments.count, mask), __shfl_xor_sync(kAllLanes, moments.mean, mask),
                     __shfl_xor_sync(kAllLanes, moments.m2, mask)});
    if (lane < Shape::kParts) shared[threadIdx.x / kWarp][lane * Shape::kValues + v] = moments;
  }
  __syncthreads();
  if (int(threadIdx.x) >= Shape::kOut) return;
  Moments<float> moments = shared[0][threadIdx.x];
  for (int warp = 1; warp < kWarps; ++warp) moments.merge(shared[warp][threadIdx.x]);
  partial[threadIdx.x] = moments;
}

// Block (x, y): items in turn, and the y-th kOut output channels. With `partial`, (gridDim.x, out), for which it must
// have been compiled to gather, it leaves the moments of what it stored.
template <class Shape, bool kGathers>
__global__ void __launch_bounds__(kThreads, Shape::kBlocksPerSM(kGathers))
    narrow_kernel(Conv conv, Plan plan, Moments<float>* partial) {
  using T = typename Shape::T;
  const int first_out = blockIdx.y * Shape::kOut;
  auto* vectors = reinterpret_cast<float*>(&shared_memory<Words>());
  auto* fragments = reinterpret_cast<T*>(vectors + 2 * Shape::kOut);
  for (int channel = threadIdx.x; channel < Shape::kOut; channel += kThreads) {
    vectors[channel] = channel_or(conv.scale, first_out + channel, 1.f);
    vectors[Shape::kOut + channel] = channel_or(conv.shift, first_out + channel, 0.f);
  }
  gather_weight<Shape>(conv, plan.steps_in, first_out, fragments);
  __syncthreads();

  Warp<Shape> warp(conv, plan, first_out, fragments, vectors);
  RunningMoments<Shape::kValues> moments;
  for (int64_t item = blockIdx.x * kWarps + threadIdx.x / kWarp; item < plan.items; item += gridDim.x * kWarps)
    warp.run(item, kGathers && partial, moments);
  if (kGathers && partial) merge_lanes<Shape>(moments, partial + int64_t(blockIdx.x) * conv.out + first_out);
}

}  // namespace slowfast_fast::cuda::narrow
