#include "instances.cuh"

namespace slowfast_fast::cuda::narrow {

template int64_t launch<torch::headeronly::Half, Moments<float>>(Queue&, const Conv&, Moments<float>*);
template int64_t launch<torch::headeronly::Half, GradientSum<float>>(Queue&, const Conv&, GradientSum<float>*);
template PartialWgrad launch_wgrad<torch::headeronly::Half>(Queue&, const ConvBackward&, const float*, const float*,
                                                            const OutRows&);

}  // namespace slowfast_fast::cuda::narrow
