#include <torch/csrc/stable/library.h>

#include "../temporal_conv.h"
#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast, CUDA, m) {
  using namespace slowfast_fast;
  m.impl("temporal_conv", TORCH_BOX(&temporal_conv<Cuda>));
  m.impl("temporal_conv_backward", TORCH_BOX(&temporal_conv_backward<Cuda>));
  m.impl("temporal_conv_bn", TORCH_BOX(&temporal_conv_bn<Cuda>));
  m.impl("temporal_conv_bn_backward", TORCH_BOX(&temporal_conv_bn_backward<Cuda>));
  m.impl("update_running_stats", TORCH_BOX(&update_running_stats<Cuda>));
}
