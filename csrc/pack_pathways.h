// pack_pathways: decoded frames as the input of both pathways, for any device that carries out primitives.h.
#pragma once
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "checks.h"

namespace slowfast_fast {

// Rows of pixels need the three colours of a pixel, and the pixels of a row, side by side; N, T and H may have any
// stride.
inline void check_frames(const Tensor& frames) {
  STD_TORCH_CHECK(frames.dim() == 5 && frames.size(4) == 3, "frames must be (N, T, H, W, 3)");
  STD_TORCH_CHECK(frames.scalar_type() == ScalarType::Byte, "frames must be uint8");
  STD_TORCH_CHECK(frames.numel() == 0 || (frames.stride(4) == 1 && (frames.size(3) == 1 || frames.stride(3) == 3)),
                  "a row of frames must be 3 * W adjacent bytes");
}

// Where each frame's slow copies are: first[t] ... first[t + 1]. The slow frames are in order, so that one read of a
// frame serves them all.
inline std::vector<int64_t> first_slow_frames(const std::vector<int64_t>& slow_frames, int64_t frames) {
  std::vector<int64_t> first(static_cast<size_t>(frames) + 1);
  int64_t previous = 0;
  for (const int64_t t : slow_frames) {
    STD_TORCH_CHECK(t >= previous && t < frames, "slow_frames must be in ascending order and among the ", frames,
                    " frames, got ", t);
    previous = t;
    ++first[static_cast<size_t>(t) + 1];
  }
  for (size_t t = 0; t + 1 < first.size(); ++t) first[t + 1] += first[t];
  return first;
}

template <class Device>
std::tuple<Tensor, Tensor> pack_pathways(const Tensor& frames, std::vector<int64_t> slow_frames,
                                         std::vector<double> scale, std::vector<double> shift, ScalarType dtype) {
  check_frames(frames);
  STD_TORCH_CHECK(scale.size() == 3 && shift.size() == 3, "scale and shift must have a value for each colour");
  const int64_t n = frames.size(0), t = frames.size(1), h = frames.size(2), w = frames.size(3);
  const auto first = first_slow_frames(slow_frames, t);
  const auto empty = [&](int64_t count) { return empty_channels_last({n, 3, count, h, w}, dtype, frames.device()); };
  const auto t_slow = static_cast<int64_t>(slow_frames.size());
  const Tensor slow = empty(t_slow), fast = empty(t);
  const PackPathways args{n,
                          t,
                          h,
                          w,
                          t_slow,
                          dtype_of(fast, "dtype"),
                          static_cast<const uint8_t*>(frames.data_ptr()),
                          frames.stride(0),
                          frames.stride(1),
                          frames.stride(2),
                          first.data(),
                          {scale[0], scale[1], scale[2]},
                          {shift[0], shift[1], shift[2]},
                          slow.data_ptr(),
                          fast.data_ptr()};
  if (frames.numel() > 0) Device(frames).pack_pathways(args);
  return {slow, fast};
}

template <class Device, class Library>
void register_pack_pathways(Library& m) {
  m.impl("pack_pathways", TORCH_BOX(&pack_pathways<Device>));
}

}  // namespace slowfast_fast
