// The narrow kernels are many: each dtype's are compiled in a source of its own, device_narrow_*.cu.
#pragma once
#include "queue.cuh"

namespace slowfast_fast::cuda::narrow {

extern template int64_t launch<torch::headeronly::Half>(Queue&, const Conv&, Moments<float>*);
extern template int64_t launch<torch::headeronly::BFloat16>(Queue&, const Conv&, Moments<float>*);
extern template int64_t launch<float>(Queue&, const Conv&, Moments<float>*);

extern template PartialWgrad launch_wgrad<torch::headeronly::Half>(Queue&, const ConvBackward&, const float*,
                                                                   const float*, const OutRows&);
extern template PartialWgrad launch_wgrad<torch::headeronly::BFloat16>(Queue&, const ConvBackward&, const float*,
                                                                       const float*, const OutRows&);
extern template PartialWgrad launch_wgrad<float>(Queue&, const ConvBackward&, const float*, const float*,
                                                 const OutRows&);

}  // namespace slowfast_fast::cuda::narrow
