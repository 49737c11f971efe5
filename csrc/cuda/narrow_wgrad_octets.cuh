// The products of narrow_wgrad.cuh: octets of x times octets of the gradient, summed over positions, on tensor cores or
// by FMA, with the sums in the same places.
#pragma once
#include "narrow_wgrad_steps.cuh"

namespace slowfast_fast::cuda::narrow {

template <class T>
constexpr int kPositionsAtOnce = 32 / int(sizeof(T));  // of a product

// What a lane holds of a product of pairs of octets of x with octets of the gradient: see WgradWarp::each.
template <int pairs, int octets>
using WgradSums = float[pairs][octets][4];

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

}  // namespace slowfast_fast::cuda::narrow
