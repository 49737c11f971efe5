// What the kernels take from the compiler. A host compiler finds the same names in cuda_host.h, which the tests bring:
// it runs every kernel of this folder, unchanged, on a CPU.
#pragma once
#include <cstddef>

namespace slowfast_fast::cuda {

// Of a block on sm_80, which has the least among the architectures that the library is built for.
constexpr size_t kMostSharedBytes = 163 << 10;

}  // namespace slowfast_fast::cuda

#ifdef __CUDACC__
#include <cuda_runtime.h>

namespace slowfast_fast::cuda {

// The block's dynamic shared memory, whose size the launch gave.
template <class Layout>
__device__ Layout& shared_memory() {
  static_assert(sizeof(Layout) <= kMostSharedBytes);
  extern __shared__ __align__(16) unsigned char bytes[];
  return *reinterpret_cast<Layout*>(bytes);
}

}  // namespace slowfast_fast::cuda
#else
#include <cuda_host.h>
#endif
