#include "instances.cuh"

namespace slowfast_fast::cuda {

template void backward(Queue&, const ConvBackward&);
template void normalise_pool_backward(Queue&, const NormalisePoolBackward&);

}  // namespace slowfast_fast::cuda
