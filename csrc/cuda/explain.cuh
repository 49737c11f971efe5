// Which kernels a convolution takes, and why not faster ones: what launch.cuh decides, in words.
#pragma once
#include <string>

#include "launch.cuh"

namespace slowfast_fast::cuda {

// A convolution with dense tensors, or with none that lies at a multiple of 16 bytes.
inline ConvForward example_forward(const ConvShape& s, Dtype dtype, bool tf32, bool aligned) {
  const auto begin = reinterpret_cast<void*>(uintptr_t(aligned ? sizeof(Words) : 1));
  ConvForward args{};
  args.shape = s;
  args.dtype = dtype;
  args.tf32 = tf32;
  args.x = {begin, s.t_in * s.p * s.c, s.p * s.c, s.c};
  args.weight = begin;
  args.y = {begin, s.t_out * s.p * s.k, s.p * s.k, s.k};
  return args;
}

inline ConvBackward example_backward(const ConvForward& forward) {
  ConvBackward args{};
  args.shape = forward.shape;
  args.dtype = forward.dtype;
  args.tf32 = forward.tf32;
  args.grad = {forward.y.data, forward.y.stride_n, forward.y.stride_t, forward.y.stride_p};
  args.x = forward.x;
  args.weight = forward.weight;
  args.dx = {forward.y.data, forward.x.stride_n, forward.x.stride_t, forward.x.stride_p};
  return args;
}

inline std::string general_because(const char* reason) { return std::string("general kernels: ") + reason; }

// "forward: ...; dgrad: ...; wgrad: ..."
inline std::string explain(const ConvShape& s, Dtype dtype, bool tf32, bool aligned) {
  const ConvForward forward = example_forward(s, dtype, tf32, aligned);
  const ConvBackward backward = example_backward(forward);
  std::string said;
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto say = [&](const char* product, bool narrow, const char* reason, auto&& tiled) {
      said += std::string(said.empty() ? "" : "; ") + product + ": ";
      if constexpr (std::is_same_v<T, double>) said += general_because(reason);
      else said += narrow ? "narrow kernels" : reason ? general_because(reason) : tiled();
    };
    const char* of_backward = tile::why_not(backward);
    say("forward", !narrow::why_not<T>(forward), tile::why_not(forward),
        [&] { return tile::describe_rows<T, tile::Major::Depth>(rows_out(s), s.k, s.c, s.kt, tf32); });
    const bool narrow_dgrad = !of_backward && !narrow::why_not_dgrad<T>(backward);
    say("dgrad", narrow_dgrad, of_backward ? of_backward : tile::why_not_dgrad(s), [&] {
      return tile::describe_rows<T, tile::Major::Outer>(ceil_div(rows_in(s), s.stride), s.c, s.k,
                                                        ceil_div(s.kt, s.stride), tf32);
    });
    const bool narrow_wgrad = !of_backward && !narrow::why_not_wgrad<T>(backward);
    say("wgrad", narrow_wgrad, of_backward, [&] { return tile::describe_wgrad<T>(s, tf32); });
  });
  return said;
}

// The same of the members of ConvShape, in their order, for callers in C. The text is the thread's, until its next
// call.
inline const char* explain(const int64_t* shape, int dtype, bool tf32, bool aligned) {
  static thread_local std::string text;
  const ConvShape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6], shape[7], shape[8], shape[9]};
  text = explain(s, static_cast<Dtype>(dtype), tf32, aligned);
  return text.c_str();
}

}  // namespace slowfast_fast::cuda
