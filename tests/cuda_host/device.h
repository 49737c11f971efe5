// The primitives as csrc/cuda launches them, on fibers.
#pragma once
#include "cuda/device.h"

namespace slowfast_fast {

class HostQueue;

class Fibers {
 public:
  explicit Fibers(const Tensor&) {}
  HostQueue queue() const;
};

using CudaHost = CudaPrimitives<Fibers>;
extern template class CudaPrimitives<Fibers>;

}  // namespace slowfast_fast
