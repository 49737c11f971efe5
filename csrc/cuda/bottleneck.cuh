// A bottleneck block of the fast pathway on tensor cores: a, b, c, residual and ReLUs in one kernel.
//
// Each product has rows of x, or of a, as its left operand: every lane reads 16 bytes of its row at a time, a *chunk*,
// and four lanes of a quad read four chunks that need not lie side by side. The depth of a product is a list of chunks,
// [tap][channels], so that any number of taps and of channels fills it but for the last step; the weight is brought to
// that order once (pack_weights), in fragments of which a warp reads 512 adjacent bytes.
//
//   a   rows of x in global memory, kt frames (in L1 after the first), to shared memory, in T as a layer's result is
//   b   rows of a in shared memory, zeros beside the image, to registers
//   c   those registers as they stand: a lane of the result has adjacent channels (see narrow.cuh), so it has a part of
//       the depth of the next product; beside them the shortcut, of rows of x
#pragma once
#include "bottleneck_weights.cuh"
#include "narrow.cuh"

namespace slowfast_fast::cuda::bottleneck {

constexpr int kWarps = kThreads / int(kWarp);
constexpr int kOutTiles = 4, kOut = 8 * kOutTiles;  // output channels of c at a time
constexpr size_t kMostBandBytes = 48 << 10;         // of shared memory: three blocks leave 110 KB of L1 for x on sm_90
constexpr int64_t kMostOut = 4096;                  // K, whose shifts are in shared memory too

template <class T_, int j>
struct Shape {
  using T = T_;
  static constexpr int kSize = Pack<T>::kSize, kJ = j, kTiles = j / 8, kChunks = j / kSize;
  static constexpr int kValues = j / 4;  // adjacent channels of a or b that a lane has of a row
  static constexpr int kWords = (kValues + kSize - 1) / kSize;
  // Products of 16 rows that share a fragment of the weight; one where the registers of b leave no room for two.
  static constexpr int kDown = sizeof(T) * j > 128 ? 1 : 2;
  static constexpr int kRows = 16 * kDown;
  // Two rows next to each other must not begin at the same bank.
  static constexpr int kPitch = j + (j * sizeof(T) % 128 == 0 ? 64 / int(sizeof(T)) : 0);
  // Asked of the compiler; the sums of b and of c leave the widest no room for a third.
  static constexpr int kBlocksPerSM = sizeof(T) * j == 128 ? 2 : 3;
  static constexpr int kStepsB = (9 * kChunks + kQuad - 1) / kQuad;
};

template <class Shape>
size_t shared_bytes(const Plan& plan) {
  return size_t(Shape::kJ + plan.block.k) * sizeof(float) +
         size_t(plan.band.frames) * plan.a_rows * plan.a_columns * Shape::kPitch * sizeof(typename Shape::T);
}

// What a chunk of the depth is: 16 bytes of the channels under a tap. A lane begins with that of its place in the quad.
struct Cursor {
  int tap = 0, chunk;

  __device__ Cursor(int chunks) : chunk(int(threadIdx.x % kQuad)) { settle(chunks); }
  __device__ void step(int chunks) {
    chunk += kQuad;
    settle(chunks);
  }

 private:
  __device__ void settle(int chunks) {
    for (; chunk >= chunks; chunk -= chunks) ++tap;
  }
};

// sum += rows * weight. load(to) brings the next step's chunks of this lane's rows; `fragments` are its own of the
// first step. The next step is on its way while one is multiplied.
template <class Shape, int tiles, class Load>
__device__ void multiply(float (&sum)[Shape::kDown][tiles][4], const typename Shape::T* fragments, int steps,
                         Load&& load) {
  using T = typename Shape::T;
  Words next[Shape::kDown][2];
  load(next);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    Words now[Shape::kDown][2];
#pragma unroll
    for (int d = 0; d < Shape::kDown; ++d)
#pragma unroll
      for (int h = 0; h < 2; ++h) now[d][h] = next[d][h];
    if (step + 1 < steps) load(next);
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile, fragments += kWarp * Shape::kSize) {
      const Words weight = load16(fragments);
#pragma unroll
      for (int d = 0; d < Shape::kDown; ++d) narrow::multiply<T>(sum[d][tile], now[d], weight);
    }
  }
}

template <class Shape>
class Block {
  using T = typename Shape::T;
  static constexpr int kDown = Shape::kDown, kSize = Shape::kSize, kValues = Shape::kValues;

 public:
  __device__ Block(const Plan& plan, const Weights& weights, const float* shifts, T* a)
      : plan_(plan),
        s_(plan.block),
        weights_(weights),
        shifts_(shifts),
        a_(a),
        item_(plan, blockIdx.x),
        h_(item_.row, item_.rows, int(s_.h), s_),
        w_(item_.column, item_.columns, int(s_.w), s_),
        lane_(threadIdx.x % kWarp),
        warp_(threadIdx.x / kWarp) {}

  // Zeros for the places of a beside the image.
  __device__ void clear_beside() const {
    const int places = item_.frames * plan_.a_rows * plan_.a_columns;
    for (int i = threadIdx.x; i < places; i += kThreads) {
      const Place at(i, plan_.a_rows, plan_.a_columns);
      if (h_.holds(at.row) && w_.holds(at.column)) continue;
#pragma unroll
      for (int j = 0; j < Shape::kJ; j += kSize) *reinterpret_cast<Words*>(a_ + i * Shape::kPitch + j) = Words{};
    }
  }

  __device__ void temporal() const {
    const int count = item_.frames * h_.count() * w_.count(), chunks = int(s_.c) / kSize;
    for (int first = warp_ * Shape::kRows; first < count; first += kWarps * Shape::kRows) {
      const T* x[kDown][2];
      int frame[kDown][2], to[kDown][2];
      bool present[kDown][2];
      each_row([&](int d, int h) {
        present[d][h] = row(first, d, h) < count;
        // The frames of a position follow each other, so that what their taps share is still in L1.
        const int index = present[d][h] ? row(first, d, h) : first, position = index / item_.frames;
        const int image_row = h_.begin + position / w_.count(), image_column = w_.begin + position % w_.count();
        frame[d][h] = item_.t + index % item_.frames - int(s_.padding);
        x[d][h] = row_at<T>(s_.x, {item_.n, 0, image_row * s_.w + image_column});
        to[d][h] = place(index % item_.frames, image_row - h_.first, image_column - w_.first);
      });
      float sum[kDown][Shape::kTiles][4] = {};
      Cursor at(chunks);
      multiply<Shape>(sum, fragments(0), int(weights_.of[0].steps), [&](Words(&words)[kDown][2]) {
        each_row([&](int d, int h) {
          const int t = frame[d][h] + at.tap;
          words[d][h] = Words{};
          if (present[d][h] && at.tap < s_.kt && t >= 0 && t < s_.t)
            words[d][h] = rounded(load16(x[d][h] + t * s_.x.stride_t + at.chunk * kSize));
        });
        at.step(chunks);
      });
      each_row([&](int d, int h) {
        if (present[d][h])
          stage(activated(sum[d], h, static_cast<const float*>(s_.shift_a)), a_ + to[d][h] + quad() * kValues);
      });
    }
  }

  __device__ void spatial_and_pointwise() const {
    const int count = item_.frames * item_.rows * item_.columns;
    for (int first = warp_ * Shape::kRows; first < count; first += kWarps * Shape::kRows) {
      const T* from[kDown][2];
      each_row([&](int d, int h) {
        const Place at = output(first, d, h, count);
        from[d][h] = a_ + place(at.frame, at.row * int(s_.stride), at.column * int(s_.stride));
      });
      float sum[kDown][Shape::kTiles][4] = {};
      Cursor at(Shape::kChunks);
      multiply<Shape>(sum, fragments(1), Shape::kStepsB, [&](Words(&words)[kDown][2]) {
        const int tap = place(0, at.tap / 3, at.tap % 3) * int(s_.dilation) + at.chunk * kSize;
        each_row([&](int d, int h) { words[d][h] = at.tap < 9 ? load16(from[d][h] + tap) : Words{}; });
        at.step(Shape::kChunks);
      });
      Words inner[Shape::kWords][kDown][2] = {};
      each_row([&](int d, int h) {
        const Inner values = activated(sum[d], h, shifts_);
#pragma unroll
        for (int word = 0; word < Shape::kWords; ++word)
          memcpy(&inner[word][d][h], values.of + word * kSize,
                 sizeof values < sizeof(Words) ? sizeof values : sizeof(Words));
      });
      pointwise(first, count, inner);
    }
  }

 private:
  struct Inner {
    T of[kValues];
  };

  template <class F>
  __device__ static void each_row(const F& f) {
#pragma unroll
    for (int d = 0; d < kDown; ++d)
#pragma unroll
      for (int h = 0; h < 2; ++h) f(d, h);
  }
  __device__ int quad() const { return lane_ % kQuad; }
  __device__ int row(int first, int d, int h) const { return first + 16 * d + 8 * h + lane_ / kQuad; }
  // In shared memory, of a frame of the item and a place of its reach.
  __device__ int place(int frame, int row, int column) const {
    return ((frame * plan_.a_rows + row) * plan_.a_columns + column) * Shape::kPitch;
  }
  // That of a row; of the first one for rows that are none, whose results nobody takes.
  __device__ Place output(int first, int d, int h, int count) const {
    return {row(first, d, h) < count ? row(first, d, h) : first, item_.rows, item_.columns};
  }
  __device__ const T* fragments(int of, int64_t group = 0) const {
    const Weight& weight = weights_.of[of];
    return static_cast<const T*>(weight.to) + (group * weight.steps * weight.tiles * kWarp + lane_) * kSize;
  }

  __device__ static Words rounded(Words words) {
    if constexpr (std::is_same_v<T, float>) round_to_tf32(words.of);
    return words;
  }
  // A lane's channels of a or b in a row, as operands of the next product.
  __device__ Inner activated(const float (&sum)[Shape::kTiles][4], int h, const float* shift) const {
    Inner inner;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const float value = relu(sum[v / 2][2 * h + v % 2] + shift[quad() * kValues + v]);
      inner.of[v] = T(value);
      if constexpr (std::is_same_v<T, float>) {
        const uint32_t bits = to_tf32(value);
        memcpy(&inner.of[v], &bits, sizeof bits);
      }
    }
    return inner;
  }
  __device__ static void stage(const Inner& inner, T* to) {
    using Word = Access<sizeof inner>;
#pragma unroll
    for (int i = 0; i < kValues; i += sizeof(Word) / sizeof(T)) {
      Word word;
      memcpy(&word, inner.of + i, sizeof word);
      *reinterpret_cast<Word*>(to + i) = word;
    }
  }

  __device__ void pointwise(int first, int count, Words (&inner)[Shape::kWords][kDown][2]) const {
    const int chunks = int(s_.c) / kSize;
#pragma unroll 1
    for (int k = 0; k < s_.k; k += kOut) {
      float sum[kDown][kOutTiles][4] = {};
      const T* weight = fragments(2, k / kOut);
#pragma unroll
      for (int word = 0; word < Shape::kWords; ++word)
#pragma unroll
        for (int tile = 0; tile < kOutTiles; ++tile, weight += kWarp * kSize) {
          const Words of_tile = load16(weight);
#pragma unroll
          for (int d = 0; d < kDown; ++d) narrow::multiply<T>(sum[d][tile], inner[word][d], of_tile);
        }
      if (s_.weight_shortcut) {
        const T* x[kDown][2];
        each_row([&](int d, int h) { x[d][h] = input(first, d, h, count); });
        Cursor at(chunks);
        multiply<Shape>(sum, fragments(3, k / kOut), int(weights_.of[3].steps), [&](Words(&words)[kDown][2]) {
          each_row(
              [&](int d, int h) { words[d][h] = at.tap == 0 ? rounded(load16(x[d][h] + at.chunk * kSize)) : Words{}; });
          at.step(chunks);
        });
      }
      each_row([&](int d, int h) {
        if (row(first, d, h) < count) finish(sum[d], first, d, h, count, k + quad() * 2 * kOutTiles);
      });
    }
  }

  __device__ const T* input(int first, int d, int h, int count) const {
    const Place at = output(first, d, h, count);
    return row_at<T>(s_.x, item_.input(plan_, at.frame, at.row, at.column));
  }

  __device__ void finish(const float (&sum)[kOutTiles][4], int first, int d, int h, int count, int channel) const {
    constexpr int kOutValues = 2 * kOutTiles;
    const float* shift = shifts_ + Shape::kJ + channel;
    T values[kOutValues], residual[kOutValues];
    if (!s_.weight_shortcut) load_values(residual, input(first, d, h, count) + channel);
#pragma unroll
    for (int v = 0; v < kOutValues; ++v) {
      float y = sum[v / 2][2 * h + v % 2] + shift[v];
      if (!s_.weight_shortcut) y += float(residual[v]);
      values[v] = T(relu(y));
    }
    const Place at = output(first, d, h, count);
    store_values(values, row_at<T>(s_.y, item_.output(plan_, at.frame, at.row, at.column)) + channel);
  }

  const Plan& plan_;
  const Bottleneck& s_;
  const Weights& weights_;
  const float* shifts_;  // of b, and of c with the shortcut's
  T* a_;
  Item item_;
  Reach h_, w_;
  int lane_, warp_;
};

template <class Shape>
__global__ void __launch_bounds__(kThreads, Shape::kBlocksPerSM) bottleneck_kernel(Plan plan, Weights weights) {
  const Bottleneck& s = plan.block;
  auto* shifts = reinterpret_cast<float*>(&shared_memory<Words>());
  for (int i = threadIdx.x; i < Shape::kJ; i += kThreads) shifts[i] = static_cast<const float*>(s.shift_b)[i];
  for (int i = threadIdx.x; i < s.k; i += kThreads)
    shifts[Shape::kJ + i] = static_cast<const float*>(s.shift_c)[i] + channel_or(s.shift_shortcut, i, 0.f);
  auto* a = reinterpret_cast<typename Shape::T*>(shifts + Shape::kJ + s.k);
  const Block<Shape> block(plan, weights, shifts, a);
  block.clear_beside();
  block.temporal();
  __syncthreads();
  block.spatial_and_pointwise();
}

}  // namespace slowfast_fast::cuda::bottleneck
