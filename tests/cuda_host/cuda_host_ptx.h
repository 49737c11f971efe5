// The functions of csrc/cuda/ptx.cuh on fibers, with PTX's fragment layouts.
#pragma once
#include "cuda_host.h"

namespace slowfast_fast::cuda {

inline Words load16(const void* from) {
  cuda_host::check_aligned("a 16-byte load", from, 16);
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}
inline void store16(void* to, const Words& words) {
  cuda_host::check_aligned("a 16-byte store", to, 16);
  std::memcpy(to, &words, sizeof words);
}

// What a lane brings to a matrix product; its result takes the place of d.
struct MmaOperands {
  float d[4];
  uint32_t a[4], b[2];
};

// By whichever lane comes last: Element is 2 or 4 bytes, a depth of 16 or 8 elements.
template <class Element, class ToFloat>
void multiply_fragments(cuda_host::Luggage (&lanes)[32], const ToFloat& to_float) {
  constexpr int kPerWord = 4 / sizeof(Element), kHalf = 4 * kPerWord, kDepthOfMma = 2 * kHalf;
  MmaOperands of[32];
  for (int lane = 0; lane < 32; ++lane) std::memcpy(&of[lane], &lanes[lane], sizeof of[lane]);
  const auto element = [&](uint32_t word, int i) {
    Element e;
    std::memcpy(&e, reinterpret_cast<const char*>(&word) + i * sizeof(Element), sizeof e);
    return to_float(e);
  };
  float a[16][kDepthOfMma], b[8][kDepthOfMma];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, first = lane % 4 * kPerWord;
    for (int i = 0; i < kPerWord; ++i)
      for (int half = 0; half < 2; ++half) {
        a[g][first + i + half * kHalf] = element(of[lane].a[2 * half], i);
        a[g + 8][first + i + half * kHalf] = element(of[lane].a[2 * half + 1], i);
        b[g][first + i + half * kHalf] = element(of[lane].b[half], i);
      }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = of[lane].d[i];
      for (int depth = 0; depth < kDepthOfMma; ++depth) sum += a[row][depth] * b[column][depth];
      of[lane].d[i] = sum;
    }
    std::memcpy(&lanes[lane], &of[lane], sizeof of[lane]);
  }
}

inline void run_mma(const char* instruction, const cuda_host::Site& site, cuda_host::Combine combine, float (&d)[4],
                    const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(sizeof(MmaOperands) <= sizeof(cuda_host::Luggage));
  const MmaOperands mine{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  std::memcpy(d, &cuda_host::meet(instruction, site, &mine, sizeof mine, combine)[threadIdx.x % 32], sizeof d);
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         const cuda_host::Site& site = cuda_host::Site()) {
  run_mma(
      "mma", site, [](cuda_host::Luggage(&lanes)[32]) { multiply_fragments<T>(lanes, [](T e) { return float(e); }); },
      d, a, b);
}

inline float truncate_to_tf32(uint32_t bits) {
  bits &= ~0x1FFFu;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const cuda_host::Site& site = cuda_host::Site()) {
  run_mma(
      "mma_tf32", site, [](cuda_host::Luggage(&lanes)[32]) { multiply_fragments<uint32_t>(lanes, truncate_to_tf32); },
      d, a, b);
}

inline uint32_t to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
  return finite ? (bits + 0x1000u) & ~0x1FFFu : bits;
}

template <int count>
void load_matrices(const char* instruction, const cuda_host::Site& site, bool transposed, uint32_t (&r)[count],
                   const void* row) {
  cuda_host::check_shared(instruction, row, 16);
  const cuda_host::Luggage* lanes = cuda_host::meet(instruction, site, &row, sizeof row);
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  for (int m = 0; m < count; ++m)
    for (int i = 0; i < 2; ++i) {
      const char* from;
      std::memcpy(&from, &lanes[m * 8 + (transposed ? 2 * q + i : g)], sizeof from);
      std::memcpy(reinterpret_cast<char*>(&r[m]) + 2 * i, from + 2 * (transposed ? g : 2 * q + i), 2);
    }
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, const cuda_host::Site& site = cuda_host::Site()) {
  load_matrices("ldmatrix_x4", site, false, r, row);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, const cuda_host::Site& site = cuda_host::Site()) {
  load_matrices("ldmatrix_x4_trans", site, true, r, row);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, const cuda_host::Site& site = cuda_host::Site()) {
  load_matrices("ldmatrix_x2", site, false, r, row);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, const cuda_host::Site& site = cuda_host::Site()) {
  load_matrices("ldmatrix_x2_trans", site, true, r, row);
}

inline void cp_async16(void* shared, const void* global, bool present) {
  cuda_host::check_shared("cp_async16", shared, 16);
  cuda_host::check_aligned("cp_async16", global, 16);
  cuda_host::copy_later(shared, present ? global : nullptr, 16);
}
inline void cp_async_commit() { cuda_host::close_group(); }
template <int pending>
void cp_async_wait(const cuda_host::Site& site = cuda_host::Site()) {
  cuda_host::wait_for_groups(pending, site);
}

}  // namespace slowfast_fast::cuda
