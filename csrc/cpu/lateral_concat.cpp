#include "lateral_concat.h"

#include <torch/csrc/stable/library.h>

#include "device.h"

namespace slowfast_fast {

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast, CPU, m) {
  m.impl("lateral_concat", TORCH_BOX(&lateral_concat<Cpu>));
  m.impl("lateral_concat_bn", TORCH_BOX(&lateral_concat_bn<Cpu>));
}

}  // namespace slowfast_fast
