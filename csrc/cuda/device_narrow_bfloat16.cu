#include "narrow_instances.cuh"

template int64_t slowfast_fast::cuda::narrow::launch<torch::headeronly::BFloat16>(
    slowfast_fast::cuda::Queue&, const slowfast_fast::cuda::narrow::Conv&,
    slowfast_fast::cuda::Moments<float>*);
