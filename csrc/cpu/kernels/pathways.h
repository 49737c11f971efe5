// Decoded frames as the input of both pathways: bytes in, normalised values out, in the order in which they lie.
#pragma once
#include "source.h"

namespace slowfast_fast::cpu::SFF_ISA {

// W bytes as numbers. GCC takes a vector apart that gets four times as wide in one conversion.
template <typename A, int W>
SFF_INLINE Vec<A, W> widen_bytes(const uint8_t* p) {
  const auto bytes = load_raw<Vec<uint8_t, W>>(p);
  const auto words = __builtin_convertvector(bytes, Vec<uint16_t, W>);
  return __builtin_convertvector(__builtin_convertvector(words, Vec<int32_t, W>), Vec<A, W>);
}

// Tasks: rows of pixels of every frame.
template <typename T, int W>
void pack_pathways_rows(const PackPathways& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using V = Vec<A, W>;
  const int64_t length = 3 * args.w;
  // The colours of three vectors in a row, after which they repeat.
  V scale[3], shift[3];
  for (int i = 0; i < 3; ++i)
    for (int l = 0; l < W; ++l) {
      scale[i][l] = A(args.scale[(i * W + l) % 3]);
      shift[i][l] = A(args.shift[(i * W + l) % 3]);
    }
  for (int64_t task = begin; task < end; ++task) {
    const int64_t frame = task / args.h, y = task % args.h, n = frame / args.t, t = frame % args.t;
    const uint8_t* from = args.frames + n * args.stride_n + t * args.stride_t + y * args.stride_h;
    T* fast = static_cast<T*>(args.fast) + task * length;
    int64_t i = 0;
    for (; i + 3 * W <= length; i += 3 * W)
      for (int part = 0; part < 3; ++part)
        store<W>(fast + i + part * W, widen_bytes<A, W>(from + i + part * W) * scale[part] + shift[part]);
    for (int part = 0; i < length; ++part, i += W) {
      const int64_t count = length - i < W ? length - i : W;
      uint8_t bytes[W] = {};
      __builtin_memcpy(bytes, from + i, size_t(count));
      store<W>(fast + i, widen_bytes<A, W>(bytes) * scale[part] + shift[part], count);
    }
    // What was just written is still in L1.
    for (int64_t s = args.first[t]; s < args.first[t + 1]; ++s)
      __builtin_memcpy(static_cast<T*>(args.slow) + ((n * args.t_slow + s) * args.h + y) * length, fast,
                       size_t(length) * sizeof(T));
  }
}

}  // namespace slowfast_fast::cpu::SFF_ISA
