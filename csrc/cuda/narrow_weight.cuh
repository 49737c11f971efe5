// A narrow convolution and the kernels' shapes (narrow.cuh), and its weight in the order of their fragments.
#pragma once
#include "elementwise.cuh"
#include "masked_gradient.cuh"

namespace slowfast_fast::cuda::narrow {

constexpr int kThreads = 128, kWarps = kThreads / int(kWarp);

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
  const void *centre, *scale, *shift;  // (out) or absent: scale * (sum - centre) + shift
  Rows residual;
  const void* residual_scale;
  bool relu;
  OutRows y;                // absent: moments alone are wanted
  MaskedGradient gradient;  // in place of centre to y
};

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

}  // namespace slowfast_fast::cuda::narrow
