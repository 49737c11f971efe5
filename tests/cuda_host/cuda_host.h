// CUDA's language for a host compiler: with this header on the include path, the kernels of csrc/cuda compile and run,
// unchanged, on a CPU. It is made to find mistakes, not to be fast:
//   - A thread of a block is a fiber. It runs alone until it waits at a barrier, meets the other lanes of its warp, or
//     ends; then another one runs. In which order is the schedule's choice, so that what lacks a barrier gives a
//     different result under some schedule.
//   - Shared memory and workspace start as NaN and are as large as asked for to the byte, for AddressSanitizer.
//   - An asynchronous copy happens as early or as late as it may, by schedule.
//   - A barrier or a warp's instruction that only some of the threads reach, or a launch that CUDA would refuse, throws
//     std::runtime_error.
#pragma once
#include <cstddef>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// The barrier's place in the source is its name: see skip_barrier.
#define __syncthreads() ::cuda_host::barrier(::cuda_host::Site())
#define __syncwarp() ::cuda_host::warp_barrier(::cuda_host::Site())

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the thread that is running now.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

// A place in the source: that of the call in which it is a default argument.
struct Site {
  const char* file;
  int line;
  explicit Site(const char* file_ = __builtin_FILE(), int line_ = __builtin_LINE()) : file(file_), line(line_) {}
  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
  std::string name() const;  // "file.cuh:12"
};

// The order in which the blocks of a grid and the threads of a block get their turns; and when a copy happens that may
// still wait: at once, as late as it may, or either.
enum class Schedule { Ascending, Descending, Random };
void set_schedule(Schedule schedule);

void barrier(const Site& site);
void warp_barrier(const Site& site);

// The barriers, of blocks and warps, and the waits for copies that threads have come to so far, by name, separated by
// spaces.
const char* barriers_seen();

// From now on threads pass the barrier or wait of that name as if it were not written; an empty name: none.
void skip_barrier(const char* name);

// What a lane brings to its warp's meeting and takes from it.
struct alignas(16) Luggage {
  unsigned char bytes[64];
};
// An instruction of a warp. Waits until every lane has brought its luggage to it; combine, if any, is called once on
// that of all 32 lanes, in which each lane then finds its result. The returned array stays as it is until this lane's
// meeting after the next.
using Combine = void (*)(Luggage (&lanes)[32]);
const Luggage* meet(const char* instruction, const Site& site, const void* mine, size_t bytes,
                    Combine combine = nullptr);

// The names of the kernels launched since they were last forgotten, separated by spaces.
void note_launch(const void* kernel);
const char* kernels_launched();
void forget_launches();

// Runs kernel() in every thread of every block of the grid.
void run_grid(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel);

// The running block's dynamic shared memory, of `size` bytes at least.
void* shared_memory(size_t size);

// Throws unless all of [address, address + bytes) is in the block's shared memory and address is a multiple of bytes.
void check_shared(const char* instruction, const void* address, size_t bytes);
void check_aligned(const char* instruction, const void* address, size_t bytes);

// Copies of this thread, as cp.async makes them.
void copy_later(void* to, const void* from, size_t bytes);  // zeros if from is nullptr
void close_group();
void wait_for_groups(size_t but_newest, const Site& site);

template <class T>
T shuffle(const char* instruction, const Site& site, unsigned lanes, T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(Luggage));
  if (lanes != 0xFFFFFFFFu)
    throw std::runtime_error(std::string(instruction) + " among some lanes only is not supported here");
  T result;
  std::memcpy(&result, &meet(instruction, site, &value, sizeof value)[from % 32], sizeof result);
  return result;
}

}  // namespace cuda_host

template <class T>
T __shfl_sync(unsigned lanes, T value, int from, const cuda_host::Site& site = cuda_host::Site()) {
  return cuda_host::shuffle("__shfl_sync", site, lanes, value, unsigned(from));
}
template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int mask, const cuda_host::Site& site = cuda_host::Site()) {
  return cuda_host::shuffle("__shfl_xor_sync", site, lanes, value, threadIdx.x % 32 ^ unsigned(mask));
}
template <class T>
T __shfl_down_sync(unsigned lanes, T value, unsigned delta, const cuda_host::Site& site = cuda_host::Site()) {
  const unsigned lane = threadIdx.x % 32;
  return cuda_host::shuffle("__shfl_down_sync", site, lanes, value, lane + delta < 32 ? lane + delta : lane);
}

namespace slowfast_fast::cuda {

template <class Layout>
Layout& shared_memory() {
  return *static_cast<Layout*>(cuda_host::shared_memory(sizeof(Layout)));
}

}  // namespace slowfast_fast::cuda
