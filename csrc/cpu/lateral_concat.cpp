#include "lateral_concat.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast, CPU, m) { slowfast_fast::register_lateral_concat<slowfast_fast::Cpu>(m); }
