// The backward of a layer with the options that no op of one layer has: a sum in dgrad's epilogue, and the gradient of
// the convolution's output. What is given of dx, dx_residual and dconv may share memory, as primitives.h allows.
#include <torch/csrc/stable/library.h>

#include "device.h"

namespace slowfast_fast {
namespace {

// raw: the BatchNorm form. Sums that are not given are not wanted.
void layer_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const OptionalTensor& gamma,
                    const OptionalTensor& beta, const OptionalTensor& raw, const OptionalTensor& mean,
                    const OptionalTensor& invstd, const OptionalTensor& dx, const OptionalTensor& dx_residual,
                    const OptionalTensor& dconv, const OptionalTensor& dweight, const OptionalTensor& dscale,
                    const OptionalTensor& dshift, int64_t stride, int64_t padding, int64_t dilation, bool relu,
                    bool tf32) {
  const ConvShape s = conv_shape(x, weight, stride, padding, dilation);
  const auto pointer = [](const OptionalTensor& t) { return t ? t->data_ptr() : nullptr; };
  ConvBackward args = backward_args(s, grad, x, weight, tf32);
  args.relu = relu;
  args.bn = {optional_rows(raw, x, output_sizes(s, x), "raw"),
             pointer(mean),
             pointer(invstd),
             pointer(gamma),
             pointer(beta),
             {}};
  if (dx) args.dx = out_rows(*dx);
  if (dx_residual) args.dx_residual = rows(*dx_residual, "dx_residual");
  if (dconv) args.dconv = out_rows(*dconv);
  args.dweight = pointer(dweight);
  args.dscale = pointer(dscale);
  args.dshift = pointer(dshift);
  CudaHost(x).backward(args);
}

}  // namespace
}  // namespace slowfast_fast

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast_cuda_host, CPU, m) {
  m.impl("layer_backward", TORCH_BOX(&slowfast_fast::layer_backward));
}
