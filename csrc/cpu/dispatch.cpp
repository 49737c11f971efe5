#include <cstdlib>
#include <cstring>

#include "device.h"

namespace slowfast_fast::cpu {
namespace {

const Kernels& choose() {
#if defined(SFF_HAVE_X86_ISAS)
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const bool default_only = limit && !std::strcmp(limit, "default"), no_avx512 = limit && !std::strcmp(limit, "avx2");
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!default_only && !no_avx512 && has_avx512) return avx512::kernels();
  if (!default_only && has_avx2) return avx2::kernels();
#endif
  return baseline::kernels();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace slowfast_fast::cpu

// For `python -m slowfast_fast info`, through ctypes.
extern "C" __attribute__((visibility("default"))) const char* slowfast_fast_cpu_capability() {
  return slowfast_fast::cpu::kernels().name;
}
