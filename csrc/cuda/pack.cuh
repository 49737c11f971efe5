// Adjacent channels that one access of up to 16 bytes moves.
#pragma once
#include "ptx.cuh"
#include "types.cuh"

namespace slowfast_fast::cuda {

template <class T>
struct Pack {
  static constexpr int kSize = sizeof(Words) / sizeof(T);
  T of[kSize];

  __device__ void load(const T* from) {
    const Words words = load16(from);
    memcpy(of, &words, sizeof of);
  }
  __device__ void store(T* to) const {
    Words words;
    memcpy(&words, of, sizeof of);
    store16(to, words);
  }
};

// The widest access that `bytes` adjacent bytes allow.
template <int bytes>
using Access = std::conditional_t<bytes % 16 == 0, Words, std::conditional_t<bytes % 8 == 0, uint64_t, uint32_t>>;

template <class T, int count>
__device__ void load_values(T (&to)[count], const T* from) {
  using Word = Access<count * sizeof(T)>;
#pragma unroll
  for (int i = 0; i < count; i += sizeof(Word) / sizeof(T)) {
    Word word;
    if constexpr (std::is_same_v<Word, Words>) word = load16(from + i);
    else word = *reinterpret_cast<const Word*>(from + i);
    memcpy(to + i, &word, sizeof word);
  }
}

template <class T, int count>
__device__ void store_values(const T (&from)[count], T* to) {
  using Word = Access<count * sizeof(T)>;
#pragma unroll
  for (int i = 0; i < count; i += sizeof(Word) / sizeof(T)) {
    Word word;
    memcpy(&word, from + i, sizeof word);
    if constexpr (std::is_same_v<Word, Words>) store16(to + i, word);
    else *reinterpret_cast<Word*>(to + i) = word;
  }
}

// The same for a pack of one channel too.
template <class T, int kPack>
__device__ void load_pack(T (&to)[kPack], const T* from) {
  if constexpr (kPack == 1) to[0] = *from;
  else load_values(to, from);
}

template <class T, int kPack>
__device__ void store_pack(const T (&from)[kPack], T* to) {
  if constexpr (kPack == 1) *to = from[0];
  else store_values(from, to);
}

// Why rows of this many channels cannot be read in packs; nullptr if they can.
template <class T, class... Tensors>
const char* why_not_packs(int64_t channels, const Tensors&... tensors) {
  const auto aligned = [](const auto& rows) {
    return reinterpret_cast<uintptr_t>(rows.data) % sizeof(Pack<T>) == 0 &&
           (rows.stride_n | rows.stride_t | rows.stride_p) % Pack<T>::kSize == 0;
  };
  if (channels % Pack<T>::kSize != 0) return "the channels are no multiple of 16 bytes";
  if (!(aligned(tensors) && ...)) return "a tensor's rows do not start at multiples of 16 bytes";
  return nullptr;
}

template <int size>
struct Size {
  static constexpr int kSize = size;
};

// Calls f with the Size of the packs in which the tensors can be read: 16 bytes, or one channel. Nobody asks for speed
// in float64, which no GPU backend takes.
template <class T, class F, class... Tensors>
void with_pack(F&& f, int64_t channels, const Tensors&... tensors) {
  if constexpr (!std::is_same_v<T, double>)
    if (!why_not_packs<T>(channels, tensors...)) return f(Size<Pack<T>::kSize>{});
  f(Size<1>{});
}

}  // namespace slowfast_fast::cuda
