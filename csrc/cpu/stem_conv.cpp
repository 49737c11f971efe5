#include "stem_conv.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast, CPU, m) { slowfast_fast::register_stem_conv<slowfast_fast::Cpu>(m); }
