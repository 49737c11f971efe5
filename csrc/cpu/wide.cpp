#include "wide.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast, CPU, m) { slowfast_fast::register_wide<slowfast_fast::Cpu>(m); }
