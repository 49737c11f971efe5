// What a device must be able to do. The operators (temporal_conv.h, lateral_concat.h) are written once on top of these
// structures; cpu/device.h and cuda/device.h carry them out. Plain C++: no PyTorch header, so that kernel sources that
// are compiled for a special instruction set, or by a host compiler in a test, can include it.
#pragma once
#include <cstdint>

namespace slowfast_fast {

// Storage type of activations and weights. Per-channel vectors (scale, shift, gamma, beta, mean, ...) are always of the
// accumulation type: double for Float64, else float.
enum class Dtype { Float32, Float64, Float16, BFloat16 };

// A (N, C, T, H, W) tensor as rows of C adjacent channels. Row (n, t, p), p = h * W + w, starts at
// data + n * stride_n + t * stride_t + p * stride_p, counted in elements. stride_p exceeds the number of channels when
// the rows are a channel slice of a wider tensor. data == nullptr: the argument is absent.
template <typename Pointer>
struct RowsOf {
  Pointer data = nullptr;
  int64_t stride_n = 0, stride_t = 0, stride_p = 0;
};
using Rows = RowsOf<const void*>;
using OutRows = RowsOf<void*>;

// y[n, k, t, p] = sum over c, j of weight[k, c, j] * x[n, c, t * stride + j * dilation - padding, p], frames outside
// the clip being 0.
struct ConvShape {
  int64_t n, c, k;
  int64_t t_in, t_out;
  int64_t p;  // positions of a frame, H * W
  int64_t kt, stride, padding, dilation;
  bool taps_first = false;  // the weight and its gradient lie as (K, kt, C), channels_last_3d, not as (K, C, kt)

  int64_t weight_stride_c() const { return taps_first ? 1 : kt; }
  int64_t weight_stride_tap() const { return taps_first ? c : 1; }
};

// Where the statistics of a convolution's output go: per channel, over all N * t_out * p rows.
struct BatchStats {
  void* mean;
  void* invstd;        // 1 / sqrt(biased variance + eps)
  void* unbiased_var;  // what a running variance takes
  double eps;
};

// y = act(scale * conv(x) + shift + residual); scale, shift and residual may be absent.
struct ConvForward {
  ConvShape shape;
  Dtype dtype;
  bool tf32;  // factors of a Float32 product may be rounded to TF32; a device may ignore it
  Rows x;
  const void* weight;  // (K, C, kt), dense
  const void* scale;   // (K)
  const void* shift;   // (K)
  Rows residual;
  bool relu;
  OutRows y;
  const void* packed =
      nullptr;  // the weight as the device's pack() left it for such a convolution; absent: packed by the call
  // On a device that recomputes(), (K) or absent: what is subtracted from conv(x) before all else, and the residual's
  // factor.
  const void *centre = nullptr, *residual_scale = nullptr;
};

// y = act(norm(conv(x)) + residual) with BatchNorm's statistics of the batch, where conv has neither scale nor shift.
// conv(x) is computed twice, for its statistics and for y, and stored nowhere.
struct NormalisedForward {
  ConvForward conv;
  BatchStats stats;
  const void *gamma, *beta;  // (K), or absent
};

// y[n, k, t, h, w] = sum over c and (i, j, l) of weight[k, c, i, j, l] * x[n, c, t * stride[0] + i - padding[0],
// h * stride[1] + j - padding[1], w * stride[2] + l - padding[2]], positions outside the clip being 0. Sizes are (T, H,
// W).
struct StemShape {
  int64_t n, c, k;
  int64_t in[3], out[3], kernel[3], stride[3], padding[3];
};

// A (N, C, T, H, W) tensor in any layout: strides in elements.
struct StridedClips {
  const void* data;
  int64_t n, c, t, h, w;
};

// y = act(conv(x) + shift): the first convolution of a pathway, from the few channels of a clip; shift may be absent.
struct StemForward {
  StemShape shape;
  Dtype dtype;
  StridedClips x;
  StridedClips weight;  // (K, C, kt, kh, kw)
  const void* shift;    // (K)
  bool relu;
  OutRows y;
};

// Its weight's gradient, which lies in memory as `weight`, whose values are not read.
struct StemWgrad {
  StemShape shape;
  Dtype dtype;
  StridedClips x;
  Rows grad;
  StridedClips weight;
  void* dweight;
};

// A 3 x 3 convolution C -> K of images that keep their size.
struct SpatialShape {
  int64_t n, c, k;
  int64_t t, h, w;

  int64_t tiles() const { return n * t * ((h + 1) / 2) * ((w + 1) / 2); }  // of 2 x 2 results
};

// y[n, k, t, h, w] = act(sum over c, i, j of weight[k, c, i, j] * x[n, c, t, h + i - 1, w + j - 1] + shift[k] +
// residual), positions outside the image being 0; shift and residual may be absent.
struct SpatialForward {
  SpatialShape shape;
  Dtype dtype;
  Rows x;
  const void* weight;                              // (K, C, 3, 3)
  int64_t stride_k, stride_c, stride_h, stride_w;  // its strides in elements, of either sign
  const void* shift;                               // (K)
  Rows residual;
  bool relu;
  OutRows y;
  const void* packed;  // as in ConvForward
};

// dweight[k, c, i, j] = sum over n, t, h, w of grad[n, k, t, h, w] * x[n, c, t, h + i - 1, w + j - 1].
struct SpatialWgrad {
  SpatialShape shape;
  Dtype dtype;
  Rows x, grad;
  void* dweight;                                   // (K, C, 3, 3)
  int64_t stride_k, stride_c, stride_h, stride_w;  // its strides in elements
};

// y[n, c, t, h, w] = max over the kernel x kernel window of x[n, c, t] at (h, w) * stride - padding, positions outside
// the image left out; NaN wins, as in torch. No window lies outside altogether.
struct MaxPool {
  int64_t n, c, t;
  int64_t h_in, w_in, h_out, w_out;
  int64_t kernel, stride, padding;
  Dtype dtype;
  Rows x;
  OutRows y;
};

// fast[n, c, t, h, w] = frames[n, t, h, w, c] * scale[c] + shift[c], and slow[:, :, s] = fast[:, :, t] for each s of
// first[t] ... first[t + 1]: bytes as a decoder leaves them to the input of both pathways. The results are dense.
struct PackPathways {
  int64_t n, t, h, w;
  int64_t t_slow;
  Dtype dtype;  // of the results
  const uint8_t* frames;
  int64_t stride_n, stride_t, stride_h;  // a row of pixels is 3 * w adjacent bytes
  const int64_t* first;                  // t + 1 values, in the memory of the host
  double scale[3], shift[3];
  void *slow, *fast;
};

// The statistics of rows that a library's convolution left.
struct RowStatistics {
  int64_t n, k, t, p;
  Dtype dtype;
  Rows raw;
  BatchStats stats;
};

// y = act((raw - mean) * invstd * gamma + beta + residual); gamma, beta and residual may be absent.
struct Normalise {
  int64_t n, k, t, p;
  Dtype dtype;
  Rows raw;
  const void *mean, *invstd, *gamma, *beta;
  Rows residual;
  bool relu;
  OutRows y;
};

// y = pool(act((x - mean) * invstd * gamma + beta)); gamma and beta may be absent.
struct NormalisePool {
  MaxPool pool;
  const void *mean, *invstd, *gamma, *beta;
  bool relu;
};

// Its backward, through the batch's statistics of x too. The gradient of a window goes to its first maximum, found
// again from x; forward.pool.y is not read. Results whose pointer is nullptr are not wanted.
struct NormalisePoolBackward {
  NormalisePool forward;
  Rows grad;
  OutRows dx;
  void *dgamma, *dbeta;
};

// Places of a window that the backward numbers in one byte, beside the one that says that no gradient passes.
constexpr int64_t most_window = 255;

// The backward of ConvForward (bn.mean absent) or of convolution, batch statistics and Normalise (bn.mean present).
// Where bn.raw is absent from the latter, as it may be on a device that recomputes(), it is that of NormalisedForward:
// conv(x) is computed from x in each pass that needs it, y is the mask, bn.residual is absent, and with relu dresidual
// is wanted if anything but sums is. Results whose pointer is nullptr are not wanted.
struct ConvBackward {
  ConvShape shape;
  Dtype dtype;
  bool tf32;  // as in ConvForward, for both products
  Rows grad;  // with respect to the op's output
  Rows x;
  const void* weight;
  bool relu;
  const void* scale;  // affine form: (K) or absent
  Rows y;             // with relu, without bn.raw: the op's output, whose sign is the mask
  struct {
    Rows raw;
    const void *mean, *invstd, *gamma, *beta;
    Rows residual;
  } bn;
  OutRows dx;
  Rows dx_residual;  // added to dx; may be dx itself
  OutRows dconv;     // BatchNorm form: the gradient of the convolution's output, which the products then read; may be
                     // grad or bn.raw, or without bn.raw dresidual
  void* dweight;     // (K, C, kt), as the weight, in dtype
  void* dscale;      // dscale or dgamma
  void* dshift;      // dshift or dbeta
  OutRows dresidual;
};

// The backward of a pointwise convolution r[k] = sum over c of weight[k, c] * x[c] and BatchNorm with its statistics,
// without r: it is linear in x, so what BatchNorm's backward takes from r follows from products of rows summed over all
// N = n * t * p rows. With P those of grad and x - mean(x), S those of x - mean(x) with itself and s the sum of grad:
//   dgamma = invstd * (sum over c of weight * P)
//   dweight = scale * P + slope * (weight S),  scale = gamma * invstd,  slope = -scale * invstd * dgamma / N
//   dx = grad (scale * weight) + (x - mean(x)) mixing - s / N (scale * weight),  mixing = weight^T (slope * weight)
// Results whose pointer is nullptr are not wanted. With dx comes scale (K), for its first term, which is the caller's
// to add.
struct FoldedBackward {
  int64_t n, t, p, c, k;
  Dtype dtype;
  Rows grad, x;
  const void *weight, *gamma, *invstd;  // (K, C), (K) and (K); gamma may be absent
  void *dgamma, *dweight;
  OutRows dx;
  void* scale;
};

// to = from, for n * t * p rows of c channels.
struct CopyRows {
  int64_t n, c, t, p;
  Dtype dtype;
  Rows from;
  OutRows to;
};

// scale = gamma / sqrt(var + eps), shift = beta - mean * scale: BatchNorm with fixed statistics, as ConvForward applies
// it. All are (K) in the accumulation type of dtype; gamma and beta may be absent.
struct FoldBatchNorm {
  int64_t k;
  Dtype dtype;
  const void *mean, *var, *gamma, *beta;
  double eps;
  void *scale, *shift;
};

// running = (1 - f) * running + f * batch, with f = momentum, or 1 / num_batches_tracked (a cumulative average) when
// there is no momentum; num_batches_tracked counts this batch first. Absent tensors are nullptr.
struct RunningStats {
  int64_t k;
  void *running_mean, *running_var;
  Dtype running_dtype;
  int64_t* num_batches_tracked;
  const void *mean, *unbiased_var;  // accumulation type of the batch
  bool batch_is_double;
  bool cumulative;
  double momentum;
};

// y = relu(c(relu(b(relu(a(x) + shift_a)) + shift_b)) + shift_c + residual): the bottleneck block of a ResNet in
// inference. a is a (kt, 1, 1) convolution C -> J that keeps T, b a (1, 3, 3) convolution J -> J with as much padding
// as dilation, c pointwise J -> K. The residual is x, or where there is a shortcut, the pointwise convolution C -> K of
// x with the stride of b, and its shift. What b sees beside the image is 0, not relu(shift_a).
struct Bottleneck {
  int64_t n, c, j, k;
  int64_t t, h, w;           // of x
  int64_t kt, padding;       // of a: kt = 2 * padding + 1
  int64_t stride, dilation;  // of b, in H and W
  Dtype dtype;
  bool tf32;  // as in ConvForward
  Rows x;
  const void *weight_a, *shift_a;  // (J, C, kt), (J)
  const void *weight_b, *shift_b;  // (J, J, 3, 3), (J)
  const void *weight_c, *shift_c;  // (K, J), (K)
  const void *weight_shortcut,
      *shift_shortcut;  // (K, C), (K); nullptr without a shortcut, which needs C = K and stride 1
  OutRows y;            // shares no memory with x

  int64_t h_out() const { return (h - 1) / stride + 1; }
  int64_t w_out() const { return (w - 1) / stride + 1; }
};

}  // namespace slowfast_fast
