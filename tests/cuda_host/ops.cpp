// The operators on the CUDA kernels run by the host, for CPU tensors, in a library of their own; the test defines their
// schemas as csrc/ops.cpp has them. Then what a test needs to steer the harness, for ctypes.
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

#include "batch_norm_max_pool.h"
#include "bottleneck.h"
#include "bottleneck_bn.h"
#include "cuda_host.h"
#include "device.h"
#include "frames_concat.h"
#include "pack_pathways.h"
#include "wide.h"

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast_cuda_host, CPU, m) {
  slowfast_fast::register_temporal_conv<slowfast_fast::CudaHost>(m);
  slowfast_fast::register_lateral_concat<slowfast_fast::CudaHost>(m);
  slowfast_fast::register_max_pool<slowfast_fast::CudaHost>(m);
  slowfast_fast::register_pack_pathways<slowfast_fast::CudaHost>(m);
  slowfast_fast::register_batch_norm_max_pool<slowfast_fast::CudaHost>(m);
  slowfast_fast::register_bottleneck<slowfast_fast::CudaHost>(m);
  slowfast_fast::register_bottleneck_bn<slowfast_fast::CudaHost>(m);
  slowfast_fast::register_wide<slowfast_fast::CudaHost>(m);
  slowfast_fast::register_frames_concat<slowfast_fast::CudaHost>(m);
}

extern "C" {
void cuda_host_set_schedule(int schedule) { cuda_host::set_schedule(static_cast<cuda_host::Schedule>(schedule)); }
void cuda_host_skip_barrier(const char* name) { cuda_host::skip_barrier(name); }
const char* cuda_host_barriers_seen() { return cuda_host::barriers_seen(); }
const char* cuda_host_kernels_launched() { return cuda_host::kernels_launched(); }
void cuda_host_forget_launches() { cuda_host::forget_launches(); }
}
