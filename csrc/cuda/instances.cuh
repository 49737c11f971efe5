// What takes a compiler long has sources of its own, which several compilers share: the backward, blocks, and the
// narrow kernels of each dtype.
#pragma once
#include "bottleneck_launch.cuh"
#include "queue.cuh"

namespace slowfast_fast::cuda {

extern template void backward(Queue&, const ConvBackward&);
extern template void normalise_pool_backward(Queue&, const NormalisePoolBackward&);

namespace bottleneck {
extern template void run(Queue&, const Bottleneck&);
}

namespace narrow {

extern template int64_t launch<torch::headeronly::Half>(Queue&, const Conv&, Moments<float>*);
extern template int64_t launch<torch::headeronly::BFloat16>(Queue&, const Conv&, Moments<float>*);
extern template int64_t launch<float>(Queue&, const Conv&, Moments<float>*);

extern template PartialWgrad launch_wgrad<torch::headeronly::Half>(Queue&, const ConvBackward&, const float*,
                                                                   const float*, const OutRows&);
extern template PartialWgrad launch_wgrad<torch::headeronly::BFloat16>(Queue&, const ConvBackward&, const float*,
                                                                       const float*, const OutRows&);
extern template PartialWgrad launch_wgrad<float>(Queue&, const ConvBackward&, const float*, const float*,
                                                 const OutRows&);

}  // namespace narrow
}  // namespace slowfast_fast::cuda
