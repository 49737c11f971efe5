#include "frames_concat.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast, CPU, m) { slowfast_fast::register_frames_concat<slowfast_fast::Cpu>(m); }
