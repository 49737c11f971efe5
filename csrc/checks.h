// From tensors to primitives.h, with the checks that a direct call of torch.ops.slowfast_fast needs in order not to
// read out of bounds. The messages meant for users are raised earlier, in slowfast_fast/ops/.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>

#include "empty.h"
#include "primitives.h"

namespace slowfast_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::Float32;
    case ScalarType::Double: return Dtype::Float64;
    case ScalarType::Half: return Dtype::Float16;
    case ScalarType::BFloat16: return Dtype::BFloat16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float64, float16 or bfloat16");
  }
}

inline ScalarType accumulation_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_like(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " has another dtype than the input");
  STD_TORCH_CHECK(t.device() == x.device(), name, " is on another device than the input");
}

// Rows need channels side by side and one stride for the positions of a frame; a stride over a dimension of size 1 or
// in a tensor without elements says nothing.
template <typename Pointer>
RowsOf<Pointer> as_rows(const Tensor& t, Pointer data, const char* name) {
  STD_TORCH_CHECK(t.dim() == 5, name, " must be (N, C, T, H, W), got ", t.dim(), " dimensions");
  const int64_t c = t.size(1), h = t.size(3), w = t.size(4);
  const int64_t stride_p = w > 1 ? t.stride(4) : h > 1 ? t.stride(3) : c;
  STD_TORCH_CHECK(
      t.numel() == 0 || ((c == 1 || t.stride(1) == 1) && (h == 1 || w == 1 || t.stride(3) == w * t.stride(4))), name,
      " must be rows (channels_last_3d or a slice of it)");
  return {data, t.size(0) > 1 ? t.stride(0) : 0, t.size(2) > 1 ? t.stride(2) : 0, stride_p};
}

inline Rows rows(const Tensor& t, const char* name) { return as_rows<const void*>(t, t.data_ptr(), name); }

inline void check_sizes(const Tensor& t, const Sizes& sizes, const char* name) {
  STD_TORCH_CHECK(t.dim() == 5, name, " must be (N, C, T, H, W), got ", t.dim(), " dimensions");
  for (int64_t d = 0; d < 5; ++d)
    STD_TORCH_CHECK(t.size(d) == sizes[d], name, " has size ", t.size(d), " in dimension ", d, ", expected ", sizes[d]);
}

inline Rows rows_of(const Tensor& t, const Tensor& like, const Sizes& sizes, const char* name) {
  check_like(t, like, name);
  check_sizes(t, sizes, name);
  return rows(t, name);
}

inline Rows optional_rows(const OptionalTensor& t, const Tensor& like, const Sizes& sizes, const char* name) {
  return t ? rows_of(*t, like, sizes, name) : Rows{};
}

// A contiguous vector of k values in the accumulation type of x; nullptr when absent.
inline const void* vector(const OptionalTensor& v, const Tensor& x, int64_t k, const char* name) {
  if (!v) return nullptr;
  STD_TORCH_CHECK(v->dim() == 1 && v->size(0) == k && v->is_contiguous(), name, " must be a contiguous vector of ", k);
  STD_TORCH_CHECK(v->scalar_type() == accumulation_type(x), name, " must be of the accumulation dtype");
  STD_TORCH_CHECK(v->device() == x.device(), name, " is on another device than the input");
  return v->data_ptr();
}

// (K, C, kt, 1, 1) in the memory of a dense (K, kt, C).
inline bool has_taps_first(const Tensor& weight) {
  const int64_t c = weight.size(1), kt = weight.size(2);
  return weight.stride(1) == 1 && weight.stride(2) == c && (weight.size(0) == 1 || weight.stride(0) == c * kt);
}

// May the weight lie with its taps first?
enum class WeightLayout { Contiguous, Any };

inline ConvShape conv_shape(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, int64_t dilation,
                            WeightLayout layout = WeightLayout::Contiguous) {
  STD_TORCH_CHECK(x.dim() == 5, "x must be (N, C, T, H, W), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(weight.dim() == 5 && weight.size(1) == x.size(1) && weight.size(3) == 1 && weight.size(4) == 1 &&
                      weight.numel() > 0,
                  "weight must be (K, C, kt, 1, 1) with the C of the input");
  const bool taps_first = !weight.is_contiguous();
  STD_TORCH_CHECK(!taps_first || (layout == WeightLayout::Any && has_taps_first(weight)), "weight must be contiguous",
                  layout == WeightLayout::Any ? " or channels_last_3d" : "");
  check_like(weight, x, "weight");
  STD_TORCH_CHECK(stride >= 1 && padding >= 0 && dilation >= 1,
                  "stride and dilation must be positive, padding not negative");
  const int64_t kt = weight.size(2), span = x.size(2) + 2 * padding - dilation * (kt - 1);
  STD_TORCH_CHECK(span >= 1, "the kernel is longer than the padded clip");
  return {x.size(0), x.size(1), weight.size(0), x.size(2), (span - 1) / stride + 1, x.size(3) * x.size(4), kt,
          stride,    padding,   dilation,       taps_first};
}

inline Sizes output_sizes(const ConvShape& s, const Tensor& x) { return {s.n, s.k, s.t_out, x.size(3), x.size(4)}; }

inline Tensor empty_channels_last(const Tensor& like, const Sizes& sizes) {
  return empty_channels_last(sizes, like.scalar_type(), like.device());
}

// Contiguous, of the size of a 5-D tensor.
inline Tensor empty_contiguous(const Tensor& like) {
  const Sizes sizes{like.size(0), like.size(1), like.size(2), like.size(3), like.size(4)};
  return empty(sizes, like.scalar_type(), like.device());
}

inline Tensor empty_vector(const Tensor& like, int64_t k) {
  return empty<1>({k}, accumulation_type(like), like.device());
}

// What an op returns for a result that was not asked for.
inline Tensor nothing(const Tensor& like) { return empty<1>({0}, like.scalar_type(), like.device()); }

// A convolution of x, which messages call `name`: what is scaled, added and cut off, and where the result goes, is for
// the caller to say.
inline ConvForward conv_args(const ConvShape& s, const Tensor& x, const Tensor& weight, bool tf32,
                             const char* name = "x") {
  ConvForward args{};
  args.shape = s;
  args.dtype = dtype_of(x, name);
  args.tf32 = tf32;
  args.x = rows(x, name);
  args.weight = weight.data_ptr();
  return args;
}

// Its backward from `grad`, but for what stood between the convolution and its result, and for what is wanted.
inline ConvBackward backward_args(const ConvShape& s, const Tensor& grad, const Tensor& x, const Tensor& weight,
                                  bool tf32) {
  ConvBackward args{};
  args.shape = s;
  args.dtype = dtype_of(x, "x");
  args.tf32 = tf32;
  args.grad = rows_of(grad, x, output_sizes(s, x), "grad");
  args.x = rows(x, "x");
  args.weight = weight.data_ptr();
  return args;
}

// Memory of a device for the length of a call on `like`.
template <class Device>
class CallMemory {
 public:
  CallMemory(const Tensor& like, int64_t bytes) : memory_(empty<1>({bytes}, ScalarType::Byte, like.device())) {}
  void* get() const { return memory_.data_ptr(); }

 private:
  Tensor memory_;
};

inline OutRows out_rows(const Tensor& t) { return as_rows<void*>(t, t.data_ptr(), "output"); }

// The rows of channels [first, ...) of a dense channels-last tensor.
inline OutRows channel_slice(const Tensor& t, int64_t first) {
  OutRows r = out_rows(t);
  r.data = static_cast<char*>(r.data) + first * static_cast<int64_t>(t.element_size());
  return r;
}

}  // namespace slowfast_fast
