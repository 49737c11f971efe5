// Small kernels that show what the harness makes of each instruction, and of mistakes.
#include <cmath>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/ptx.cuh"

namespace slowfast_fast::cuda {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

void check(bool right) {
  if (!right) throw std::runtime_error("wrong value");
}

// Multiplies a (16 x depth) by b (depth x 8), both small integers plus what rounding must take away, and judges each
// lane's result.
template <int depth>
struct Operands {
  float a[16][depth], b[depth][8];

  Operands() {
    for (int d = 0; d < depth; ++d) {
      for (int i = 0; i < 16; ++i) a[i][d] = float((i * 7 + d * 3) % 11 - 5);
      for (int j = 0; j < 8; ++j) b[d][j] = float((d * 5 + j * 2) % 7 - 3);
    }
  }

  void judge(const float (&result)[4]) const {
    for (int i = 0; i < 4; ++i) {
      const int row = threadIdx.x / 4 + i / 2 * 8, column = threadIdx.x % 4 * 2 + i % 2;
      float sum = 1;
      for (int d = 0; d < depth; ++d) sum += a[row][d] * b[d][column];
      check(result[i] == sum);
    }
  }
};

// Each operand through ldmatrix, once with rows along the depth, once transposed.
template <class T>
void product() {
  const Operands<16> operands;
  struct Layout {
    alignas(16) T a[16][16], a_across[16][16], b[16][8], b_across[8][16];
  };
  auto& shared = shared_memory<Layout>();
  const unsigned lane = threadIdx.x;
  if (lane < 16)
    for (int i = 0; i < 16; ++i) {
      shared.a[i][lane] = shared.a_across[lane][i] = T(operands.a[i][lane]);
      if (i < 8) shared.b[lane][i] = shared.b_across[i][lane] = T(operands.b[lane][i]);
    }
  __syncwarp();
  uint32_t a[4], b[2];
  float plain[4] = {1, 1, 1, 1}, across[4] = {1, 1, 1, 1};
  ldmatrix_x4(a, &shared.a[lane % 16][lane / 16 * 8]);
  ldmatrix_x2(b, &shared.b_across[lane % 8][lane / 8 % 2 * 8]);
  mma<T>(plain, a, b);
  operands.judge(plain);
  ldmatrix_x4_trans(a, &shared.a_across[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
  ldmatrix_x2_trans(b, &shared.b[lane % 16][0]);
  mma<T>(across, a, b);
  operands.judge(across);
}

void product_tf32() {
  const Operands<8> operands;
  const unsigned g = threadIdx.x / 4, q = threadIdx.x % 4;
  const float dust = std::ldexp(1.f, -20);  // beyond TF32's 10 bits next to 1
  const auto bits = [](float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    return word;
  };
  const auto with_dust = [&](float value) { return value + (value == 0 ? 0 : std::copysign(dust, value)); };
  const uint32_t a[4] = {bits(with_dust(operands.a[g][q])), bits(with_dust(operands.a[g + 8][q])),
                         to_tf32(operands.a[g][q + 4] - dust), to_tf32(operands.a[g + 8][q + 4] - dust)};
  const uint32_t b[2] = {bits(operands.b[q][g]), to_tf32(operands.b[q + 4][g])};
  float result[4] = {1, 1, 1, 1};
  mma_tf32(result, a, b);
  for (float& value : result) value = std::round(value);  // 0 - dust stays what it is
  operands.judge(result);
}

// Two groups of copies, the second with zeros in the odd lanes.
template <bool commit, bool wait>
void copies() {
  alignas(16) static const float from[4] = {1, 2, 3, 4};
  auto& to = shared_memory<float[2][32][4]>();
  cp_async16(to[0][threadIdx.x], from, true);
  if (commit) cp_async_commit();
  cp_async16(to[1][threadIdx.x], from, threadIdx.x % 2 == 0);
  cp_async_commit();
  if (wait) {
    cp_async_wait<1>();
    check(to[0][threadIdx.x][3] == 4);
    cp_async_wait<0>();
    __syncwarp();
    const unsigned other = threadIdx.x ^ 1;
    for (int i = 0; i < 4; ++i) check(to[1][other][i] == (other % 2 == 0 ? from[i] : 0.f));
  }
}

void shuffles() {
  const int lane = int(threadIdx.x % 32);
  check(__shfl_xor_sync(kAllLanes, lane * 3, 5) == (lane ^ 5) * 3);
  check(__shfl_sync(kAllLanes, double(lane), 9) == 9.0);
  check(__shfl_down_sync(kAllLanes, lane, 8) == (lane < 24 ? lane + 8 : lane));
}

void misaligned() {
  uint32_t r[4];
  ldmatrix_x4(r, &shared_memory<char[1024]>()[threadIdx.x * 16 + 8]);
}

void from_global_memory() {
  alignas(16) static const char somewhere[16] = {};
  uint32_t r[4];
  ldmatrix_x4(r, somewhere);
}

struct Kernel {
  void (*run)();
  unsigned threads;
};
const std::map<std::string, Kernel> kKernels{
    {"product of half", {product<Half>, 32}},
    {"product of bfloat16", {product<BFloat16>, 32}},
    {"product of tf32", {product_tf32, 32}},
    {"copies", {copies<true, true>, 32}},
    {"copies without commit", {copies<false, true>, 32}},
    {"copies without wait", {copies<true, false>, 32}},
    {"shuffles", {shuffles, 64}},
    {"divergent barrier",
     {[] {
        if (threadIdx.x < 32) __syncthreads();
      },
      64}},
    {"divergent warp",
     {[] {
        if (threadIdx.x < 7) shuffles();
        else __syncwarp();
      },
      32}},
    {"absent lane",
     {[] {
        if (threadIdx.x != 7) __syncwarp();
      },
      32}},
    {"misaligned ldmatrix", {misaligned, 32}},
    {"ldmatrix of global memory", {from_global_memory, 32}},
};

}  // namespace
}  // namespace slowfast_fast::cuda

extern "C" const char* cuda_host_try(const char* kernel) {
  static std::string error;
  error.clear();
  try {
    const auto& [run, threads] = slowfast_fast::cuda::kKernels.at(kernel);
    cuda_host::run_grid(dim3(1), threads, 4096, run);
  } catch (const std::exception& thrown) {
    error = thrown.what();
  }
  return error.c_str();
}
