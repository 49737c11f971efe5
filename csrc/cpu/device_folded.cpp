// BatchNorm's backward folded into the products of a pointwise convolution. Everything is in double, in which products
// of floats are exact: dgamma is a small difference of large terms where channels share a signal that the weights
// cancel, and so is what is left of x beside its mean.
#include <cmath>
#include <vector>

#include "device.h"
#include "support.h"

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

float at(const void* vector, int64_t k, float absent) { return vector ? static_cast<const float*>(vector)[k] : absent; }

}  // namespace

void Cpu::folded_backward(const FoldedBackward& args) {
  const int64_t c = args.c, k = args.k;
  const double rows = static_cast<double>(args.n * args.t * args.p);
  Matrix of_x(index(c * (c + 1))), of_grad(index(k * (c + 1)));
  row_products(args, args.x, c, of_x.data());
  row_products(args, args.grad, k, of_grad.data());
  const Spread x(of_x, c, rows);
  Matrix slope(index(k)), spread(index(c));
  for (int64_t i = 0; i < k; ++i) {
    const float* weight = static_cast<const float*>(args.weight) + i * c;
    double* product = of_grad.data() + i * (c + 1);
    for (int64_t j = 0; j < c; ++j) product[j] -= product[c] * x.mean[index(j)];
    const double invstd = static_cast<const float*>(args.invstd)[i],
                 scale = invstd * static_cast<double>(at(args.gamma, i, 1));
    const double dgamma = invstd * dot(weight, product, c);
    slope[index(i)] = -scale * invstd * dgamma / rows;
    if (args.dgamma) static_cast<float*>(args.dgamma)[i] = static_cast<float>(dgamma);
    if (args.dx.data) static_cast<float*>(args.scale)[i] = static_cast<float>(scale);
    if (!args.dweight) continue;
    multiply(weight, x.scatter, c, spread.data());
    for (int64_t j = 0; j < c; ++j)
      static_cast<float*>(args.dweight)[i * c + j] =
          static_cast<float>(scale * product[j] + slope[index(i)] * spread[index(j)]);
  }
  if (!args.dx.data) return;
  MixPlan plan{args.n, args.t, args.p, c, args.x, nullptr, nullptr, args.dx};
  const int64_t padded = plan.padded();
  Matrix mixing(index(c * padded)), shift(index(padded));
  for (int64_t o = 0; o < k; ++o) {
    const float* weight = static_cast<const float*>(args.weight) + o * c;
    const double sum = of_grad[index(o * (c + 1) + c)],
                 factor = static_cast<double>(static_cast<const float*>(args.scale)[o]) * sum / rows;
    for (int64_t i = 0; i < c; ++i) {
      const double w = static_cast<double>(weight[i]), scaled = w * slope[index(o)];
      shift[index(i)] -= w * factor;
      for (int64_t j = 0; j < c; ++j) mixing[index(i * padded + j)] += scaled * static_cast<double>(weight[j]);
    }
  }
  for (int64_t i = 0; i < c; ++i)
    for (int64_t j = 0; j < c; ++j) shift[index(j)] -= x.mean[index(i)] * mixing[index(i * padded + j)];
  plan.mixing = mixing.data();
  plan.shift = shift.data();
  parallel(args.n * args.t * ceil_div(args.p, row_block),
           [&](int64_t begin, int64_t end) { kernels().mix(plan, begin, end); });
}

}  // namespace slowfast_fast
