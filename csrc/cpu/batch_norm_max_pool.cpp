#include "batch_norm_max_pool.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast, CPU, m) { slowfast_fast::register_batch_norm_max_pool<slowfast_fast::Cpu>(m); }
