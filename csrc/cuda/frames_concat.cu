#include "../frames_concat.h"
#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast, CUDA, m) { slowfast_fast::register_frames_concat<slowfast_fast::Cuda>(m); }
