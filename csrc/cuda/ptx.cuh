// Instructions that CUDA C++ has no name for: matrix products of a warp, the loads that feed them, and asynchronous
// copies to shared memory. A host compiler finds the same names in cuda_host_ptx.h, which the tests bring.
//
// Fragments are those of PTX. Lane l of a warp holds, with g = l / 4 and q = l % 4:
//   d (16 x 8, float)          rows g (d[0], d[1]) and g + 8 (d[2], d[3]), columns 2q and 2q + 1
//   a (16 x 16, 16-bit)        rows g (a[0], a[2]) and g + 8 (a[1], a[3]),
//                              depths 2q, 2q + 1 (a[0], a[1]) and 8 more (a[2], a[3])
//   b (16 x 8, 16-bit)         column g, depths 2q, 2q + 1 (b[0]) and 8 more (b[1])
//   a (16 x 8, TF32)           rows g (a[0], a[2]) and g + 8 (a[1], a[3]), depths q (a[0], a[1]) and q + 4 (a[2], a[3])
//   b (8 x 8, TF32)            column g, depths q (b[0]) and q + 4 (b[1])
// All lanes of a warp call the functions that say so, together.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "platform.cuh"

namespace slowfast_fast::cuda {

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// What one 16-byte access moves.
struct alignas(16) Words {
  uint32_t of[4];
};

}  // namespace slowfast_fast::cuda

#ifdef __CUDACC__

namespace slowfast_fast::cuda {

// 16-byte accesses; the address must be a multiple of 16. The store goes to global memory and is spelled out: nvcc cuts
// some of those that are written as an assignment into words.
__device__ inline Words load16(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ inline void store16(void* to, const Words& v) {
  __stwb(static_cast<uint4*>(to), make_uint4(v.of[0], v.of[1], v.of[2], v.of[3]));
}

// d += a * b, by a warp. T: Half or BFloat16.
template <class T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, torch::headeronly::Half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a * b in TF32, by a warp: the 13 lowest bits of each operand are ignored.
__device__ inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds to TF32, ties away from zero.
__device__ inline uint32_t to_tf32(float value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Four 8 x 8 matrices of 16-bit elements, by a warp: lane l brings the address of row l % 8 of matrix l / 8, a multiple
// of 16. r[m] of lane l is elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix m.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of the transposed matrices: rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// Of two matrices; the rows that lanes 16 to 31 bring are not read, but must be addresses all the same.
__device__ inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// Starts copying 16 bytes to shared memory, past L1; zeros where `present` is false, when nothing is read. They are
// there for the thread that asked after the cp_async_wait that covers their group, for others after a barrier that
// follows it.
__device__ inline void cp_async16(void* shared, const void* global, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(present ? 16 : 0)
               : "memory");
}
// Closes a group of copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread but the `pending` newest.
template <int pending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace slowfast_fast::cuda

#else
#include <cuda_host_ptx.h>
#endif

namespace slowfast_fast::cuda {

// The operands of TF32 are rounded, not cut off, which would pull every sum towards 0.
__device__ inline void round_to_tf32(uint32_t (&words)[4]) {
#pragma unroll
  for (uint32_t& word : words) {
    float value;
    memcpy(&value, &word, sizeof value);
    word = to_tf32(value);
  }
}

}  // namespace slowfast_fast::cuda
