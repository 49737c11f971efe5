// What the members of CudaPrimitives launch.
#pragma once
#include "bottleneck_launch.cuh"
#include "device.h"
#include "launch.cuh"

namespace slowfast_fast {

template <class Backing>
template <class F>
void CudaPrimitives<Backing>::in_type(Dtype dtype, const F& f) {
  auto queue = backing_.queue();
  cuda::with_type(dtype, [&](auto type) { f(queue, type); });
}

template <class Backing>
void CudaPrimitives<Backing>::forward(const ConvForward& args) {
  auto queue = backing_.queue();
  cuda::forward(queue, args, nullptr);
}

template <class Backing>
void CudaPrimitives<Backing>::forward_stats(const ConvForward& args, const BatchStats& stats) {
  auto queue = backing_.queue();
  cuda::forward(queue, args, &stats);
}

template <class Backing>
void CudaPrimitives<Backing>::forward_normalised(const NormalisedForward& args) {
  in_type(args.conv.dtype, [&](auto& queue, auto type) {
    cuda::forward_normalised<cuda::Accumulator<typename decltype(type)::type>>(queue, args);
  });
}

template <class Backing>
void CudaPrimitives<Backing>::pack(const ConvForward& args, void* to) {
  in_type(args.dtype, [&](auto& queue, auto type) { cuda::pack_as<typename decltype(type)::type>(queue, args, to); });
}

template <class Backing>
void CudaPrimitives<Backing>::max_pool(const MaxPool& args) {
  in_type(args.dtype, [&](auto& queue, auto type) { cuda::max_pool_as<typename decltype(type)::type>(queue, args); });
}

template <class Backing>
void CudaPrimitives<Backing>::pack_pathways(const PackPathways& args) {
  in_type(args.dtype,
          [&](auto& queue, auto type) { cuda::pack_pathways_as<typename decltype(type)::type>(queue, args); });
}

template <class Backing>
void CudaPrimitives<Backing>::statistics(const RowStatistics& args) {
  in_type(args.dtype, [&](auto& queue, auto type) { cuda::statistics_as<typename decltype(type)::type>(queue, args); });
}

template <class Backing>
void CudaPrimitives<Backing>::normalise_pool(const NormalisePool& args) {
  in_type(args.pool.dtype,
          [&](auto& queue, auto type) { cuda::normalise_pool_as<typename decltype(type)::type>(queue, args); });
}

template <class Backing>
void CudaPrimitives<Backing>::normalise(const Normalise& args) {
  in_type(args.dtype, [&](auto& queue, auto type) { cuda::normalise_as<typename decltype(type)::type>(queue, args); });
}

template <class Backing>
void CudaPrimitives<Backing>::copy(const CopyRows& args) {
  in_type(args.dtype, [&](auto& queue, auto type) { cuda::copy_as<typename decltype(type)::type>(queue, args); });
}

template <class Backing>
void CudaPrimitives<Backing>::fold(const FoldBatchNorm& args) {
  in_type(args.dtype, [&](auto& queue, auto type) { cuda::fold_as<typename decltype(type)::type>(queue, args); });
}

template <class Backing>
void CudaPrimitives<Backing>::update_running(const RunningStats& args) {
  in_type(args.running_dtype,
          [&](auto& queue, auto type) { cuda::update_running_as<typename decltype(type)::type>(queue, args); });
}

template <class Backing>
int64_t CudaPrimitives<Backing>::packed_bytes(const ConvForward& args) {
  return cuda::packed_bytes(args);
}

template <class Backing>
void CudaPrimitives<Backing>::backward(const ConvBackward& args) {
  auto queue = backing_.queue();
  cuda::backward(queue, args);
}

template <class Backing>
void CudaPrimitives<Backing>::normalise_pool_backward(const NormalisePoolBackward& args) {
  auto queue = backing_.queue();
  cuda::normalise_pool_backward(queue, args);
}

template <class Backing>
void CudaPrimitives<Backing>::bottleneck(const Bottleneck& args) {
  auto queue = backing_.queue();
  cuda::bottleneck::run(queue, args);
}

}  // namespace slowfast_fast
