// BatchNorm with the batch's statistics, ReLU and max_pool of a convolution's output, and the backward, for any device
// that carries out primitives.h.
#pragma once
#include <tuple>

#include "max_pool.h"

namespace slowfast_fast {

inline NormalisePool normalise_pool_args(const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta,
                                         const Tensor& mean, const Tensor& invstd, int64_t kernel, int64_t stride,
                                         int64_t padding, bool relu) {
  const MaxPool pool = max_pool_args(x, kernel, stride, padding);
  return {pool,
          vector(mean, x, pool.c, "mean"),
          vector(invstd, x, pool.c, "invstd"),
          vector(gamma, x, pool.c, "gamma"),
          vector(beta, x, pool.c, "beta"),
          relu};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_max_pool(const Tensor& x, const OptionalTensor& gamma,
                                                               const OptionalTensor& beta, int64_t kernel,
                                                               int64_t stride, int64_t padding, double eps, bool relu) {
  const int64_t c = x.dim() == 5 ? x.size(1) : 0;
  Tensor mean = empty_vector(x, c), invstd = empty_vector(x, c), unbiased_var = empty_vector(x, c);
  NormalisePool args = normalise_pool_args(x, gamma, beta, mean, invstd, kernel, stride, padding, relu);
  MaxPool& pool = args.pool;
  Tensor y = empty_channels_last(x, {pool.n, pool.c, pool.t, pool.h_out, pool.w_out});
  pool.y = out_rows(y);
  Device device(x);
  device.statistics({pool.n,
                     pool.c,
                     pool.t,
                     pool.h_in * pool.w_in,
                     pool.dtype,
                     pool.x,
                     {mean.data_ptr(), invstd.data_ptr(), unbiased_var.data_ptr(), eps}});
  device.normalise_pool(args);
  return {y, mean, invstd, unbiased_var};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> batch_norm_max_pool_backward(const Tensor& grad, const Tensor& x,
                                                                const OptionalTensor& gamma, const OptionalTensor& beta,
                                                                const Tensor& mean, const Tensor& invstd,
                                                                int64_t kernel, int64_t stride, int64_t padding,
                                                                bool relu, bool need_x, bool need_gamma,
                                                                bool need_beta) {
  NormalisePoolBackward args{};
  args.forward = normalise_pool_args(x, gamma, beta, mean, invstd, kernel, stride, padding, relu);
  const MaxPool& pool = args.forward.pool;
  STD_TORCH_CHECK(kernel * kernel <= most_window, "the backward takes windows of at most ", most_window, " places");
  args.grad = rows_of(grad, x, {pool.n, pool.c, pool.t, pool.h_out, pool.w_out}, "grad");
  Tensor dx = need_x ? empty_channels_last(x, {pool.n, pool.c, pool.t, pool.h_in, pool.w_in}) : nothing(x);
  Tensor dgamma = need_gamma ? empty_vector(x, pool.c) : nothing(x);
  Tensor dbeta = need_beta ? empty_vector(x, pool.c) : nothing(x);
  if (need_x) args.dx = out_rows(dx);
  if (need_gamma) args.dgamma = dgamma.data_ptr();
  if (need_beta) args.dbeta = dbeta.data_ptr();
  Device(x).normalise_pool_backward(args);
  return {dx, dgamma, dbeta};
}

template <class Device, class Library>
void register_batch_norm_max_pool(Library& m) {
  m.impl("batch_norm_max_pool", TORCH_BOX(&batch_norm_max_pool<Device>));
  m.impl("batch_norm_max_pool_backward", TORCH_BOX(&batch_norm_max_pool_backward<Device>));
}

}  // namespace slowfast_fast
