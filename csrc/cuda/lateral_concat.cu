#include <torch/csrc/stable/library.h>

#include "../lateral_concat.h"
#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast, CUDA, m) {
  using namespace slowfast_fast;
  m.impl("lateral_concat", TORCH_BOX(&lateral_concat<Cuda>));
  m.impl("lateral_concat_bn", TORCH_BOX(&lateral_concat_bn<Cuda>));
}
