// Every operator schema of the package. Kernels are registered beside their code, in cpu/ and cuda/;
// fake kernels, autograd and autocast live in slowfast_fast/ops/. docs/design.md explains each argument.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(slowfast_fast, m) {
  m.def(
      "temporal_conv(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, "
      "int stride, int padding, int dilation, bool relu, bool tf32) -> Tensor");
  m.def(
      "temporal_conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor? scale, Tensor? y, "
      "int stride, int padding, int dilation, "
      "bool need_x, bool need_weight, bool need_scale, bool need_shift, bool need_residual, bool tf32) "
      "-> (Tensor dx, Tensor dweight, Tensor dscale, Tensor dshift, Tensor dresidual)");
  m.def(
      "temporal_conv_bn(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor? residual, "
      "int stride, int padding, int dilation, float eps, bool relu, bool tf32) "
      "-> (Tensor y, Tensor raw, Tensor mean, Tensor invstd, Tensor unbiased_var)");
  m.def(
      "temporal_conv_bn_backward(Tensor grad, Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, "
      "Tensor? residual, Tensor raw, Tensor mean, Tensor invstd, "
      "int stride, int padding, int dilation, bool relu, "
      "bool need_x, bool need_weight, bool need_gamma, bool need_beta, bool need_residual, bool tf32) "
      "-> (Tensor dx, Tensor dweight, Tensor dgamma, Tensor dbeta, Tensor dresidual)");
  m.def(
      "temporal_conv_bn_frozen(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor running_mean, "
      "Tensor running_var, Tensor? residual, "
      "int stride, int padding, int dilation, float eps, bool relu, bool tf32) -> Tensor");
  m.def(
      "lateral_concat(Tensor slow, Tensor fast, Tensor weight, Tensor? scale, Tensor? shift, "
      "int alpha, int padding, bool relu, bool tf32) -> Tensor");
  m.def(
      "lateral_concat_bn(Tensor slow, Tensor fast, Tensor weight, Tensor? gamma, Tensor? beta, "
      "int alpha, int padding, float eps, bool relu, bool tf32) "
      "-> (Tensor out, Tensor raw, Tensor mean, Tensor invstd, Tensor unbiased_var)");
  m.def(
      "lateral_concat_bn_frozen(Tensor slow, Tensor fast, Tensor weight, Tensor? gamma, Tensor? beta, "
      "Tensor running_mean, Tensor running_var, int alpha, int padding, float eps, bool relu, bool tf32) -> Tensor");
  m.def("spatial_conv(Tensor x, Tensor weight, Tensor? shift, Tensor? residual, bool relu) -> Tensor");
  m.def("spatial_conv_pack(Tensor x, Tensor weight) -> Tensor");
  m.def(
      "spatial_conv_packed(Tensor x, Tensor weight, Tensor packed, Tensor? shift, Tensor? residual, bool relu) "
      "-> Tensor");
  m.def(
      "bottleneck(Tensor x, Tensor weight_a, Tensor shift_a, Tensor weight_b, Tensor shift_b, "
      "Tensor weight_c, Tensor shift_c, Tensor? shortcut_weight, Tensor? shortcut_shift, "
      "int padding, int stride, int dilation, bool tf32) -> Tensor");
  m.def(
      "bottleneck_out(Tensor(a!) out, Tensor x, Tensor weight_a, Tensor shift_a, Tensor weight_b, Tensor shift_b, "
      "Tensor weight_c, Tensor shift_c, Tensor? shortcut_weight, Tensor? shortcut_shift, "
      "int padding, int stride, int dilation, bool tf32) -> ()");
  m.def(
      "bottleneck_bn(Tensor x, Tensor weight_a, Tensor? gamma_a, Tensor? beta_a, "
      "Tensor weight_b, Tensor? gamma_b, Tensor? beta_b, Tensor weight_c, Tensor? gamma_c, Tensor? beta_c, "
      "Tensor? shortcut_weight, Tensor? shortcut_gamma, Tensor? shortcut_beta, "
      "int stride_a, int padding_a, int dilation_a, int stride, int dilation, "
      "float eps_a, float eps_b, float eps_c, float shortcut_eps, bool tf32) "
      "-> (Tensor out, Tensor raw_a, Tensor raw_b, "
      "Tensor stats_a, Tensor stats_b, Tensor stats_c, Tensor shortcut_stats)");
  m.def(
      "bottleneck_bn_backward(Tensor grad, Tensor x, Tensor weight_a, Tensor? gamma_a, Tensor? beta_a, "
      "Tensor weight_b, Tensor? gamma_b, Tensor? beta_b, Tensor weight_c, Tensor? gamma_c, "
      "Tensor? shortcut_weight, Tensor? shortcut_gamma, Tensor out, Tensor raw_a, Tensor raw_b, "
      "Tensor stats_a, Tensor stats_b, Tensor stats_c, Tensor shortcut_stats, "
      "int stride_a, int padding_a, int dilation_a, int stride, int dilation, int needs, bool tf32) "
      "-> (Tensor dx, Tensor dweight_a, Tensor dgamma_a, Tensor dbeta_a, Tensor dweight_b, Tensor dgamma_b, "
      "Tensor dbeta_b, Tensor dweight_c, Tensor dgamma_c, Tensor dbeta_c, "
      "Tensor dshortcut_weight, Tensor dshortcut_gamma, Tensor dshortcut_beta)");
  m.def("temporal_conv_pack(Tensor x, Tensor weight, int stride, int padding, int dilation, bool tf32) -> Tensor");
  m.def(
      "temporal_conv_packed(Tensor x, Tensor weight, Tensor packed, Tensor? scale, Tensor? shift, Tensor? residual, "
      "int stride, int padding, int dilation, bool relu, bool tf32) -> Tensor");
  m.def(
      "pack_pathways(Tensor frames, int[] slow_frames, float[] scale, float[] shift, ScalarType dtype) "
      "-> (Tensor slow, Tensor fast)");
  m.def("stem_conv(Tensor x, Tensor weight, Tensor? shift, int[] stride, int[] padding, bool relu) -> Tensor");
  m.def("stem_conv_wgrad(Tensor grad, Tensor x, Tensor weight, int[] stride, int[] padding) -> Tensor");
  m.def("max_pool(Tensor x, int kernel, int stride, int padding) -> Tensor");
  m.def(
      "batch_norm_max_pool(Tensor x, Tensor? gamma, Tensor? beta, int kernel, int stride, int padding, float eps, "
      "bool relu) -> (Tensor y, Tensor mean, Tensor invstd, Tensor unbiased_var)");
  m.def(
      "batch_norm_max_pool_backward(Tensor grad, Tensor x, Tensor? gamma, Tensor? beta, Tensor mean, Tensor invstd, "
      "int kernel, int stride, int padding, bool relu, bool need_x, bool need_gamma, bool need_beta) "
      "-> (Tensor dx, Tensor dgamma, Tensor dbeta)");
  m.def(
      "temporal_conv_lateral_concat(Tensor x, Tensor weight, Tensor? shift, Tensor? residual, "
      "int stride, int padding, int dilation, bool relu, Tensor fast, Tensor lateral_weight, Tensor? lateral_shift, "
      "int alpha, int lateral_padding, bool lateral_relu, bool tf32) -> Tensor");
  m.def(
      "max_pool_lateral_concat(Tensor x, int kernel, int stride, int padding, "
      "Tensor fast, Tensor lateral_weight, Tensor? lateral_shift, "
      "int alpha, int lateral_padding, bool lateral_relu, bool tf32) -> Tensor");
  m.def("frames_concat(Tensor slow, Tensor fast, int alpha, int taps) -> Tensor");
  m.def("frames_concat_backward(Tensor grad, int t_fast, int alpha, int taps) -> Tensor");
  m.def(
      "temporal_conv_frames_concat(Tensor x, Tensor weight, Tensor? shift, Tensor? residual, "
      "int stride, int padding, int dilation, bool relu, Tensor fast, int alpha, int taps, bool tf32) -> Tensor");
  m.def(
      "max_pool_frames_concat(Tensor x, int kernel, int stride, int padding, Tensor fast, int alpha, int taps) "
      "-> Tensor");
  m.def(
      "update_running_stats(Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, Tensor mean, Tensor unbiased_var, float? momentum) -> ()");
}
