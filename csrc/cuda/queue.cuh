// Launches on PyTorch's current stream, with workspace from its caching allocator.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "../empty.h"
#include "launch.cuh"

// Weak, so that the library also loads where PyTorch has no CUDA; nothing calls them there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
extern "C" __attribute__((weak)) AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t,
                                                                         bool, char**);
extern "C" __attribute__((weak)) void torch_c10_cuda_free_error_msg(char*);

namespace slowfast_fast::cuda {

// A kernel has to be told, once on each device, that a launch may ask for more shared memory than this.
constexpr size_t kSharedBytesByDefault = 48 << 10;

// Asks nothing of the stream, so it may happen while a graph is captured.
inline void allow_shared_memory(const void* kernel, size_t bytes, int device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard lock(mutex);
  if (allowed.count({kernel, device})) return;
  int most = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  STD_TORCH_CHECK(bytes <= size_t(most), "a kernel needs ", bytes, " bytes of shared memory, the device has ", most);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  allowed.insert({kernel, device});
}

class Queue {
 public:
  explicit Queue(const torch::stable::Device& device) : device_(device) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), const Launch& how, const Arguments&... arguments) {
    if (how.shared_bytes > kSharedBytesByDefault)
      allow_shared_memory(reinterpret_cast<const void*>(kernel), how.shared_bytes, device_.index());
    kernel<<<how.grid, how.threads, how.shared_bytes, stream_>>>(static_cast<Parameters>(arguments)...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  tile::Plan plan(const tile::Plan& chosen) const { return chosen; }
  int64_t items(int64_t wanted) const { return wanted; }
  int64_t most_grid_yz() const { return kMostGridYZ; }

  // Freed with this object: the allocator hands it out again only to work that follows on this stream.
  template <class Value>
  Value* workspace(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(Value));
    workspace_.push_back(empty<1>({bytes}, torch::headeronly::ScalarType::Byte, device_));
    return static_cast<Value*>(workspace_.back().data_ptr());
  }

 private:
  torch::stable::Device device_;
  cudaStream_t stream_ = nullptr;
  std::vector<torch::stable::Tensor> workspace_;
};

}  // namespace slowfast_fast::cuda
