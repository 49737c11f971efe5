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

// Memory for the length of a call, aligned for vectors and not initialised. What is short lies in the object itself,
// since a small call spends longer on allocating than on its products; not under AddressSanitizer, which would not see
// where a short buffer ends.
class Buffer {
 public:
  explicit Buffer(size_t bytes)
      : long_(bytes > most_inside ? ::operator new(bytes, std::align_val_t(alignment)) : nullptr) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <typename T = void>
  T* get() const {
    return static_cast<T*>(long_ ? long_.get() : inside_);
  }

 private:
  static constexpr size_t alignment = 64;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t most_inside = 0;
#else
  static constexpr size_t most_inside = 1024;
#endif
  struct Delete {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(alignment)); }
  };
  std::unique_ptr<void, Delete> long_;
  alignas(alignment) mutable unsigned char inside_[std::max<size_t>(most_inside, 1)];
};

// Runs kernel(begin, end) over all tasks, a single one without asking the thread pool.
template <typename Kernel>
void parallel(int64_t tasks, const Kernel& kernel) {
  if (tasks == 1) kernel(0, 1);
  else if (tasks > 0) torch::stable::parallel_for(0, tasks, 1, kernel);
}

// The same as kernel(begin, end, scratch), each thread with scratch memory of its own.
template <typename Kernel>
void parallel(int64_t tasks, int64_t scratch_bytes, const Kernel& kernel) {
  parallel(tasks, [&](int64_t begin, int64_t end) {
    const Buffer scratch(static_cast<size_t>(scratch_bytes));
    kernel(begin, end, scratch.get());
  });
}

template <typename Body>
auto with_accumulation(Dtype dtype, Body body) {
  return dtype == Dtype::Float64 ? body(double{}) : body(float{});
}

// A per-channel vector, padded with zeros so that kernels may load whole panels; `absent` stands for an absent one.
// Where there is `times`, it is multiplied by that.
class PaddedVector {
 public:
  PaddedVector(Dtype dtype, int64_t k, const void* from, double absent, const void* times = nullptr)
      : buffer_(static_cast<size_t>(k + vector_pad) * acc_size(dtype)) {
    with_accumulation(dtype, [&](auto zero) {
      using A = decltype(zero);
      A* to = buffer_.get<A>();
      for (int64_t i = 0; i < k; ++i) to[i] = from ? static_cast<const A*>(from)[i] : A(absent);
      std::fill(to + k, to + k + vector_pad, zero);
      if (!times) return;
      for (int64_t i = 0; i < k; ++i) to[i] *= static_cast<const A*>(times)[i];
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
