#include "../temporal_conv.h"
#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast, CUDA, m) { slowfast_fast::register_temporal_conv<slowfast_fast::Cuda>(m); }
