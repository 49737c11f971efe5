// CUDA's language for a host compiler: with this header on the include path, the kernels of csrc/cuda compile and run,
// unchanged, on a CPU. It is made to find mistakes, not to be fast:
//   - A thread of a block is a fiber. It runs alone until it waits at a barrier or ends; then another one runs. In which
//     order is the schedule's choice, so that what lacks a barrier gives a different result under some schedule.
//   - Shared memory and workspace start as NaN and are as large as asked for to the byte, for AddressSanitizer.
//   - A barrier that only some of the threads reach, or a launch that CUDA would refuse, throws std::runtime_error.
#pragma once
#include <cstddef>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// The barrier's place in the source is its name: see skip_barrier.
#define __syncthreads() ::cuda_host::barrier(__FILE__, __LINE__)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the thread that is running now.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

// The order in which the blocks of a grid and the threads of a block get their turns.
enum class Schedule { Ascending, Descending, Random };
void set_schedule(Schedule schedule);

void barrier(const char* file, int line);

// The barriers that threads have waited at so far, as "file.cuh:12", separated by spaces.
const char* barriers_seen();

// From now on threads pass the barrier of that name without waiting, as if it were not written; an empty name: none.
void skip_barrier(const char* name);

// Runs kernel() in every thread of every block of the grid.
void run_grid(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel);

// The running block's dynamic shared memory, of `size` bytes at least.
void* shared_memory(size_t size);

}  // namespace cuda_host

namespace slowfast_fast::cuda {

template <class Layout>
Layout& shared_memory() {
  return *static_cast<Layout*>(cuda_host::shared_memory(sizeof(Layout)));
}

}  // namespace slowfast_fast::cuda
