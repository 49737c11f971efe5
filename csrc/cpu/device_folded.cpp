// BatchNorm's backward folded into the products of a pointwise convolution. Everything is in double, in which products
// of floats are exact: dgamma is a small difference of large terms where channels share a signal that the weights
// cancel, and so is what is left of x beside its mean.
#include <algorithm>
#include <vector>

#include "batch_norm.h"
#include "device.h"

namespace slowfast_fast {
namespace {

using namespace cpu;
using Matrix = std::vector<double>;

size_t index(int64_t i) { return static_cast<size_t>(i); }

// The mean of x (C), and its covariance (C, C) times the number of rows, from the products of x with (x, 1).
struct Spread {
  Matrix mean, scatter;

  Spread(const Matrix& products, int64_t c, double rows) : mean(index(c)), scatter(index(c * c)) {
    for (int64_t i = 0; i < c; ++i) mean[index(i)] = products[index(i * (c + 1) + c)] / rows;
    for (int64_t i = 0; i < c; ++i)
      for (int64_t j = 0; j < c; ++j)
        scatter[index(i * c + j)] = products[index(i * (c + 1) + j)] - rows * mean[index(i)] * mean[index(j)];
  }
};

// to = row * matrix (C, C)
void multiply(const float* row, const Matrix& matrix, int64_t c, double* to) {
  std::fill(to, to + c, 0.0);
  for (int64_t i = 0; i < c; ++i)
    for (int64_t j = 0; j < c; ++j) to[j] += static_cast<double>(row[i]) * matrix[index(i * c + j)];
}

double dot(const float* a, const double* b, int64_t c) {
  double sum = 0;
  for (int64_t i = 0; i < c; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

}  // namespace

void Cpu::folded_backward(const FoldedBackward& args) {
  const int64_t c = args.c, k = args.k, rows = args.n * args.t * args.p;
  Matrix of_x(index(c * (c + 1))), of_grad(index(k * (c + 1)));
  row_products(args, args.x, c, of_x.data());
  row_products(args, args.grad, k, of_grad.data());
  const Spread x(of_x, c, static_cast<double>(rows));
  const auto weight = [&](int64_t i) { return static_cast<const float*>(args.weight) + i * c; };
  // Of each channel's gradient, and of its product with weight (x - mean(x)), which is what the convolution would have
  // left beside its mean.
  Matrix sums(index(2 * k));
  for (int64_t i = 0; i < k; ++i) {
    double* product = of_grad.data() + i * (c + 1);
    sums[index(i)] = product[c];
    for (int64_t j = 0; j < c; ++j) product[j] -= product[c] * x.mean[index(j)];
    sums[index(k + i)] = dot(weight(i), product, c);
  }
  const PaddedVector scales = normalising_factor(args.dtype, k, args.gamma, args.invstd),
                     slopes(args.dtype, k, nullptr, 0), offsets(args.dtype, k, nullptr, 0);
  finish_sums(args.dtype, sums, rows, args.invstd, scales, slopes, offsets, args.dgamma, nullptr);
  const float *scale = scales.get<float>(), *slope = slopes.get<float>(), *offset = offsets.get<float>();
  if (args.dweight) {
    Matrix spread(index(c));
    for (int64_t i = 0; i < k; ++i) {
      multiply(weight(i), x.scatter, c, spread.data());
      for (int64_t j = 0; j < c; ++j)
        static_cast<float*>(args.dweight)[i * c + j] =
            static_cast<float>(static_cast<double>(scale[i]) * of_grad[index(i * (c + 1) + j)] +
                               static_cast<double>(slope[i]) * spread[index(j)]);
    }
  }
  if (!args.dx.data) return;
  std::copy_n(scale, k, static_cast<float*>(args.scale));
  MixPlan plan{args.n, args.t, args.p, c, args.x, nullptr, nullptr, args.dx};
  const int64_t padded = plan.padded();
  Matrix mixing(index(c * padded)), shift(index(padded));
  for (int64_t o = 0; o < k; ++o)
    for (int64_t i = 0; i < c; ++i) {
      const double w = static_cast<double>(weight(o)[i]);
      shift[index(i)] += w * static_cast<double>(offset[o]);
      for (int64_t j = 0; j < c; ++j)
        mixing[index(i * padded + j)] += w * static_cast<double>(slope[o]) * static_cast<double>(weight(o)[j]);
    }
  for (int64_t i = 0; i < c; ++i)
    for (int64_t j = 0; j < c; ++j) shift[index(j)] -= x.mean[index(i)] * mixing[index(i * padded + j)];
  plan.mixing = mixing.data();
  plan.shift = shift.data();
  parallel(args.n * args.t * ceil_div(args.p, row_block),
           [&](int64_t begin, int64_t end) { kernels().mix(plan, begin, end); });
}

}  // namespace slowfast_fast
