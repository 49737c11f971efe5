#include "device.h"

#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/explain.cuh"

namespace slowfast_fast {
namespace {

std::optional<cuda::tile::Plan> forced_plan;
std::optional<int64_t> forced_items, forced_grid;

}  // namespace

class HostQueue {
 public:
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), const cuda::Launch& how, const Arguments&... arguments) {
    cuda_host::note_launch(reinterpret_cast<const void*>(kernel));
    cuda_host::run_grid(how.grid, how.threads, how.shared_bytes,
                        [&] { kernel(static_cast<Parameters>(arguments)...); });
  }

  cuda::tile::Plan plan(const cuda::tile::Plan& chosen) const { return forced_plan.value_or(chosen); }

  int64_t items(int64_t wanted) const { return forced_items.value_or(wanted); }
  int64_t most_grid_yz() const { return forced_grid.value_or(cuda::kMostGridYZ); }

  template <class Value>
  Value* workspace(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(Value);
    workspace_.emplace_back(new unsigned char[bytes]);
    std::memset(workspace_.back().get(), 0xFF, bytes);
    return reinterpret_cast<Value*>(workspace_.back().get());
  }

 private:
  std::vector<std::unique_ptr<unsigned char[]>> workspace_;
};

HostQueue Fibers::queue() const { return {}; }

template class CudaPrimitives<Fibers>;

}  // namespace slowfast_fast

// The tiled kernels' size and parts from now on; a negative size: what they choose themselves.
extern "C" void cuda_host_force_plan(int size, int parts) {
  using slowfast_fast::cuda::tile::Plan;
  using slowfast_fast::cuda::tile::Size;
  slowfast_fast::forced_plan.reset();
  if (size >= 0) slowfast_fast::forced_plan = Plan{static_cast<Size>(size), parts};
}

// The items that bottleneck's bands are cut for from now on; a negative number: what it chooses itself.
extern "C" void cuda_host_force_items(int64_t items) {
  slowfast_fast::forced_items.reset();
  if (items >= 0) slowfast_fast::forced_items = items;
}

// The limit of a grid along y and z from now on; a negative number: CUDA's.
extern "C" void cuda_host_force_grid(int64_t most) {
  slowfast_fast::forced_grid.reset();
  if (most >= 0) slowfast_fast::forced_grid = most;
}

// As slowfast_fast_cuda_bottleneck of the extension.
extern "C" const char* cuda_host_explain_bottleneck(int64_t c, int64_t j, int64_t k, int dtype, bool tf32,
                                                    bool aligned) {
  return slowfast_fast::cuda::bottleneck::explain(c, j, k, static_cast<slowfast_fast::Dtype>(dtype), tf32, aligned);
}

// As slowfast_fast_cuda_kernels of the extension.
extern "C" const char* cuda_host_explain(const int64_t* shape, int dtype, bool tf32, bool aligned) {
  return slowfast_fast::cuda::explain(shape, dtype, tf32, aligned);
}
