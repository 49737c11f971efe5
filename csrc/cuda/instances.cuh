// What takes a compiler long has sources of its own, which several compilers share: the forward, the backward, blocks,
// and the narrow kernels of each dtype.
#pragma once
#include "bottleneck_launch.cuh"
#include "queue.cuh"

namespace slowfast_fast::cuda {

extern template void forward(Queue&, const ConvForward&, const BatchStats*);
extern template void sum_gradient(Queue&, const ConvBackward&, void*, void*);
extern template void backward(Queue&, const ConvBackward&);
extern template void normalise_pool_backward(Queue&, const NormalisePoolBackward&);

namespace bottleneck {
extern template void run(Queue&, const Bottleneck&);
}

namespace narrow {

extern template int64_t launch<torch::headeronly::Half, Moments<float>>(Queue&, const Conv&, Moments<float>*);
extern template int64_t launch<torch::headeronly::Half, GradientSum<float>>(Queue&, const Conv&, GradientSum<float>*);
extern template int64_t launch<torch::headeronly::BFloat16, Moments<float>>(Queue&, const Conv&, Moments<float>*);
extern template int64_t launch<torch::headeronly::BFloat16, GradientSum<float>>(Queue&, const Conv&,
                                                                                GradientSum<float>*);
extern template int64_t launch<float, Moments<float>>(Queue&, const Conv&, Moments<float>*);
extern template int64_t launch<float, GradientSum<float>>(Queue&, const Conv&, GradientSum<float>*);

extern template PartialWgrad launch_wgrad<torch::headeronly::Half>(Queue&, const ConvBackward&, const float*,
                                                                   const float*, const OutRows&);
extern template PartialWgrad launch_wgrad<torch::headeronly::BFloat16>(Queue&, const ConvBackward&, const float*,
                                                                       const float*, const OutRows&);
extern template PartialWgrad launch_wgrad<float>(Queue&, const ConvBackward&, const float*, const float*,
                                                 const OutRows&);

}  // namespace narrow
}  // namespace slowfast_fast::cuda
