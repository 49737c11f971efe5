#include "temporal_conv.h"

#include <torch/csrc/stable/library.h>

#include "device.h"

namespace slowfast_fast {

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast, CPU, m) {
  m.impl("temporal_conv", TORCH_BOX(&temporal_conv<Cpu>));
  m.impl("temporal_conv_backward", TORCH_BOX(&temporal_conv_backward<Cpu>));
  m.impl("temporal_conv_bn", TORCH_BOX(&temporal_conv_bn<Cpu>));
  m.impl("temporal_conv_bn_backward", TORCH_BOX(&temporal_conv_bn_backward<Cpu>));
  m.impl("update_running_stats", TORCH_BOX(&update_running_stats<Cpu>));
}

}  // namespace slowfast_fast
