// PyTorch's own 2-D convolution over the frames of clips, for spatial 1x3x3 layers: over N * T images in channels_last,
// which is the memory of (N, C, T, H, W) rows.
#pragma once
#include <torch/headeronly/core/MemoryFormat.h>

#include <vector>

#include "checks.h"

namespace slowfast_fast {

// Dense rows (N, C, T, H, W) as (N * T, C, H, W).
inline Tensor as_images(const Tensor& clips) {
  const std::array<int64_t, 4> sizes{clips.size(0) * clips.size(2), clips.size(1), clips.size(3), clips.size(4)};
  return torch::stable::reshape(torch::stable::transpose(clips, 1, 2), {sizes.data(), sizes.size()});
}

// The reverse. A library may leave another layout (it does for none that it is known to take); that is copied.
inline Tensor as_clips(const Tensor& images, int64_t n) {
  const Tensor rows = torch::stable::contiguous(images, torch::headeronly::MemoryFormat::ChannelsLast);
  const int64_t frames = n ? images.size(0) / n : 0;
  const std::array<int64_t, 5> sizes{n, frames, images.size(1), images.size(2), images.size(3)};
  return torch::stable::transpose(torch::stable::reshape(rows, {sizes.data(), sizes.size()}), 1, 2);
}

struct SpatialConv {
  int64_t stride, dilation;  // in H and W; as much padding as dilation
};

// x (N, J, T, H, W), weight (J, J, 1, 3, 3).
inline Tensor convolve_images(const Tensor& x, const Tensor& weight, const SpatialConv& conv) {
  using torch::stable::detail::from;
  const std::vector<int64_t> stride(2, conv.stride), dilation(2, conv.dilation), none(2, 0);
  std::array<StableIValue, 9> stack{from(as_images(x)), from(torch::stable::squeeze(weight, 2)),
                                    from(std::nullopt), from(stride),
                                    from(dilation),     from(dilation),
                                    from(false),        from(none),
                                    from(int64_t{1})};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return as_clips(torch::stable::detail::to<Tensor>(stack[0]), x.size(0));
}

// A gradient (J, J, 3, 3) as that of a weight (J, J, 1, 3, 3), in its layout: contiguous, or else channels_last_3d.
inline Tensor as_weight(const Tensor& gradient, const Tensor& weight) {
  const auto layout = weight.is_contiguous() ? torch::headeronly::MemoryFormat::Contiguous
                                             : torch::headeronly::MemoryFormat::ChannelsLast;
  return torch::stable::unsqueeze(torch::stable::contiguous(gradient, layout), 2);
}

struct ImageGradients {
  OptionalTensor x, weight;
};

inline ImageGradients convolve_images_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                               const SpatialConv& conv, bool need_x, bool need_weight) {
  using torch::stable::detail::from;
  const std::vector<int64_t> stride(2, conv.stride), dilation(2, conv.dilation), none(2, 0);
  const std::array<bool, 3> wanted{need_x, need_weight, false};
  std::array<StableIValue, 11> stack{from(as_images(grad)),
                                     from(as_images(x)),
                                     from(torch::stable::squeeze(weight, 2)),
                                     from(std::nullopt),
                                     from(stride),
                                     from(dilation),
                                     from(dilation),
                                     from(false),
                                     from(none),
                                     from(int64_t{1}),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted.data(), wanted.size()))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  // Every result is taken out, wanted or not: a handle that is left would never be freed.
  const auto dx = torch::stable::detail::to<Tensor>(stack[0]), dweight = torch::stable::detail::to<Tensor>(stack[1]);
  torch::stable::detail::to<Tensor>(stack[2]);
  ImageGradients gradients;
  if (need_x) gradients.x = as_clips(dx, x.size(0));
  if (need_weight) gradients.weight = as_weight(dweight, weight);
  return gradients;
}

}  // namespace slowfast_fast
