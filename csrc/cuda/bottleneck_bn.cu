#include "../bottleneck_bn.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast, CUDA, m) { slowfast_fast::register_bottleneck_bn<slowfast_fast::Cuda>(m); }
