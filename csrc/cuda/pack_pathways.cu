#include "../pack_pathways.h"
#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast, CUDA, m) { slowfast_fast::register_pack_pathways<slowfast_fast::Cuda>(m); }
