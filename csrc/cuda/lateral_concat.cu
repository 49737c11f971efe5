#include "../lateral_concat.h"
#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast, CUDA, m) { slowfast_fast::register_lateral_concat<slowfast_fast::Cuda>(m); }
