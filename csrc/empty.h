// Fresh tensors. torch::stable::empty looks its operator up by name and boxes six arguments in every call, which costs
// the host more than the allocation; the C function below it, of the same ABI, does neither.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>

namespace slowfast_fast {

using Sizes = std::array<int64_t, 5>;

inline torch::stable::Tensor empty_strided(const int64_t* sizes, const int64_t* strides, size_t dimensions,
                                           torch::headeronly::ScalarType dtype, const torch::stable::Device& device) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  AtenTensorHandle tensor = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(dimensions), sizes, strides,
                                                         to<int32_t>(from(dtype)), to<int32_t>(from(device.type())),
                                                         device.index(), &tensor));
  return torch::stable::Tensor(tensor);
}

// Contiguous.
template <size_t dimensions>
torch::stable::Tensor empty(const std::array<int64_t, dimensions>& sizes, torch::headeronly::ScalarType dtype,
                            const torch::stable::Device& device) {
  std::array<int64_t, dimensions> strides;
  int64_t stride = 1;
  for (size_t d = dimensions; d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return empty_strided(sizes.data(), strides.data(), dimensions, dtype, device);
}

// channels_last_3d.
inline torch::stable::Tensor empty_channels_last(const Sizes& sizes, torch::headeronly::ScalarType dtype,
                                                 const torch::stable::Device& device) {
  const auto [n, c, t, h, w] = sizes;
  const Sizes strides{t * h * w * c, 1, h * w * c, w * c, c};
  return empty_strided(sizes.data(), strides.data(), sizes.size(), dtype, device);
}

}  // namespace slowfast_fast
