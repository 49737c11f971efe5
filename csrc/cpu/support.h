// What every operator of the CPU device needs around its kernels: memory, threads, padded vectors.
#pragma once
#include <algorithm>
#include <memory>
#include <new>

#include "checks.h"
#include "plan.h"

namespace slowfast_fast::cpu {

inline size_t acc_size(Dtype dtype) { return dtype == Dtype::Float64 ? 8 : 4; }
inline size_t storage_size(Dtype dtype) { return dtype == Dtype::Float64 ? 8 : dtype == Dtype::Float32 ? 4 : 2; }

// Of one of plan.h's kinds, what it has of a call that it shares with others.
template <class Plan, class Args>
Plan plan_of(const Args& args) {
  Plan plan{};
  plan.dtype = args.dtype;
  plan.shape = args.shape;
  plan.x = args.x;
  return plan;
}

// Memory for the length of a call, aligned for vectors and not initialised.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : memory_(::operator new(std::max<size_t>(bytes, 1), std::align_val_t(64))) {}
  template <typename T = void>
  T* get() const {
    return static_cast<T*>(memory_.get());
  }

 private:
  struct Delete {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<void, Delete> memory_;
};

// Runs kernel(begin, end, scratch) over all tasks, each thread with scratch memory of its own.
template <typename Kernel>
void parallel(int64_t tasks, int64_t scratch_bytes, const Kernel& kernel) {
  if (tasks == 0) return;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch(static_cast<size_t>(scratch_bytes));
    kernel(begin, end, scratch.get());
  });
}

template <typename Kernel>
void parallel(int64_t tasks, const Kernel& kernel) {
  if (tasks > 0) torch::stable::parallel_for(0, tasks, 1, kernel);
}

template <typename Body>
auto with_accumulation(Dtype dtype, Body body) {
  return dtype == Dtype::Float64 ? body(double{}) : body(float{});
}

// A per-channel vector, padded with zeros so that kernels may load whole panels; `absent` stands for an absent one.
class PaddedVector {
 public:
  PaddedVector(Dtype dtype, int64_t k, const void* from, double absent)
      : buffer_(static_cast<size_t>(k + vector_pad) * acc_size(dtype)) {
    with_accumulation(dtype, [&](auto zero) {
      using A = decltype(zero);
      A* to = buffer_.get<A>();
      for (int64_t i = 0; i < k; ++i) to[i] = from ? static_cast<const A*>(from)[i] : A(absent);
      std::fill(to + k, to + k + vector_pad, zero);
    });
  }
  template <typename T = void>
  T* get() const {
    return buffer_.get<T>();
  }

 private:
  Buffer buffer_;
};

}  // namespace slowfast_fast::cpu
