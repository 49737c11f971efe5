#include "instances.cuh"

namespace slowfast_fast::cuda::narrow {

template int64_t launch<float, Moments<float>>(Queue&, const Conv&, Moments<float>*);
template int64_t launch<float, GradientSum<float>>(Queue&, const Conv&, GradientSum<float>*);
template PartialWgrad launch_wgrad<float>(Queue&, const ConvBackward&, const float*, const float*, const OutRows&);

}  // namespace slowfast_fast::cuda::narrow
