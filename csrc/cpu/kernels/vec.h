// Vectors of W accumulation values (float or double) and their loads and stores from every storage type. Built on the
// vector extensions of GCC and Clang, so that one source serves every instruction set; only the half-precision
// conversions name an instruction.
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#define SFF_INLINE inline __attribute__((always_inline))

namespace slowfast_fast::cpu::SFF_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

template <typename A, int W>
struct VecOf {
  typedef A type __attribute__((vector_size(W * sizeof(A))));
};
template <typename A, int W>
using Vec = typename VecOf<A, W>::type;

template <typename To, typename From>
SFF_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

SFF_INLINE float widen(float x) { return x; }
SFF_INLINE double widen(double x) { return x; }

SFF_INLINE float widen(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

SFF_INLINE float widen(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shifting exponent and mantissa into place leaves the exponent 112 too small; the product corrects it, also for
  // subnormals. Infinity and NaN need the full exponent.
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  const bool finite = (x.bits & 0x7c00) != 0x7c00;
  const uint32_t magnitude = finite ? bits_as<uint32_t>(bits_as<float>(rest) * 0x1p112f) : rest | 0x7f800000;
  return bits_as<float>(magnitude | sign);
#endif
}

SFF_INLINE void narrow(float x, float* out) { *out = x; }
SFF_INLINE void narrow(double x, double* out) { *out = x; }

SFF_INLINE void narrow(float x, BFloat16* out) {
  const uint32_t u = bits_as<uint32_t>(x);
  out->bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);  // to nearest, ties to even
}

SFF_INLINE void narrow(float x, Half* out) {
#if defined(__F16C__)
  out->bits = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t u = bits_as<uint32_t>(x);
  const uint32_t sign = u >> 31, magnitude = u & 0x7fffffff;
  uint32_t bits;
  if (magnitude > 0x7f800000) {
    bits = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    bits = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves the subnormal, rounded, in the low bits
    bits = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    bits = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = uint16_t(bits | (sign << 15));
#endif
}

// A vector is read from and written to memory without any demand on its alignment.
template <typename V, typename A>
SFF_INLINE V load_raw(const A* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V, typename A>
SFF_INLINE void store_raw(A* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

template <int W>
SFF_INLINE Vec<float, W> load(const float* p) {
  return load_raw<Vec<float, W>>(p);
}
template <int W>
SFF_INLINE Vec<double, W> load(const double* p) {
  return load_raw<Vec<double, W>>(p);
}

template <int W>
SFF_INLINE Vec<float, W> load(const BFloat16* p) {
  using Wide = Vec<uint32_t, W>;
  const auto bits = load_raw<Vec<uint16_t, W>>(p);
  const Wide u = __builtin_convertvector(bits, Wide) << 16;
  return bits_as<Vec<float, W>>(u);
}

template <int W>
SFF_INLINE Vec<float, W> load(const Half* p) {
  Vec<float, W> v;
#if defined(__F16C__)
  static_assert(W % 8 == 0);
  for (int i = 0; i < W; i += 8) {
    const __m256 part = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
    __builtin_memcpy(reinterpret_cast<char*>(&v) + 4 * i, &part, 32);
  }
#else
  for (int i = 0; i < W; ++i) v[i] = widen(p[i]);
#endif
  return v;
}

template <int W>
SFF_INLINE void store(float* p, const Vec<float, W>& v) {
  store_raw(p, v);
}
template <int W>
SFF_INLINE void store(double* p, const Vec<double, W>& v) {
  store_raw(p, v);
}

template <int W>
SFF_INLINE void store(BFloat16* p, const Vec<float, W>& v) {
  using Bits = Vec<uint16_t, W>;
  using Wide = Vec<uint32_t, W>;
  const Wide u = bits_as<Wide>(v);
  const Wide rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const Wide chosen = v != v ? Wide{} + 0x7fc0 : rounded;
  store_raw(p, __builtin_convertvector(chosen, Bits));
}

template <int W>
SFF_INLINE void store(Half* p, const Vec<float, W>& v) {
#if defined(__F16C__)
  for (int i = 0; i < W; i += 8) {
    __m256 part;
    __builtin_memcpy(&part, reinterpret_cast<const char*>(&v) + 4 * i, 32);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i), _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  for (int i = 0; i < W; ++i) narrow(v[i], p + i);
#endif
}

// The first `count` lanes only; the others read as 0.
template <int W, typename T>
SFF_INLINE Vec<Acc<T>, W> load(const T* p, int64_t count) {
  if (count >= W) return load<W>(p);
  T lanes[W] = {};
  __builtin_memcpy(lanes, p, size_t(count) * sizeof(T));
  return load<W>(lanes);
}

template <int W, typename T>
SFF_INLINE void store(T* p, const Vec<Acc<T>, W>& v, int64_t count) {
  if (count >= W) return store<W>(p, v);
  T lanes[W];
  store<W>(lanes, v);
  __builtin_memcpy(p, lanes, size_t(count) * sizeof(T));
}

// The value as it will be read back from storage.
template <typename T, int W>
SFF_INLINE Vec<Acc<T>, W> stored(const Vec<Acc<T>, W>& v) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    return v;
  } else {
    T lanes[W];
    store<W>(lanes, v);
    return load<W>(lanes);
  }
}

// max(v, 0) that keeps NaN, as torch.relu does.
template <typename V>
SFF_INLINE V relu(const V& v) {
  return v < V{} ? V{} : v;
}

}  // namespace slowfast_fast::cpu::SFF_ISA
