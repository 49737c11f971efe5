// What launches the products of a forward: the convolution with its statistics or its epilogue, and the sums of a
// gradient beside it.
#pragma once
#include "forward.cuh"
#include "narrow_launch.cuh"
#include "tile_launch.cuh"

namespace slowfast_fast::cuda {

// Of a grid along y or z; kernels go on to the tiles beyond its end.
template <class Queue>
unsigned tiles(const Queue& queue, int64_t size) {
  return unsigned(std::min(ceil_div(size, kTile), queue.most_grid_yz()));
}

template <class T, class Queue>
void forward_as(Queue& queue, const ConvForward& args, const BatchStats* stats) {
  using Acc = Accumulator<T>;
  const ConvShape& s = args.shape;
  if constexpr (!std::is_same_v<T, double>)
    if (!narrow::why_not<T>(args)) return narrow::forward<T>(queue, args, stats);
  if (tile::forward<T>(queue, args, stats)) return;
  const Chunks chunks = cut(rows_out(s), kTile, stats ? kMostPartials : kMostBlocks);
  Moments<Acc>* partial = stats ? queue.template workspace<Moments<Acc>>(chunks.count * s.k) : nullptr;
  if (chunks.count > 0)
    queue.launch(forward_kernel<T>,
                 {dim3(unsigned(chunks.count), tiles(queue, s.k)), kThreads, sizeof(ForwardShared<Acc>)}, args, chunks,
                 partial);
  if (stats) launch_merge_statistics(queue, partial, chunks.count, s.k, rows_out(s), *stats);
}

// The convolution of a backward, beside which its epilogue reads a gradient.
inline ConvForward convolution_of(const ConvBackward& args) {
  ConvForward conv{};
  conv.shape = args.shape;
  conv.dtype = args.dtype;
  conv.tf32 = args.tf32;
  conv.x = args.x;
  conv.weight = args.weight;
  conv.residual = args.grad;
  return conv;
}

// sum and sum_xhat (K) of the gradient past the ReLU, which goes to dresidual if it is wanted; the convolution's output
// is computed on the way, and stored nowhere.
template <class T, class Queue>
void sum_gradient_as(Queue& queue, const ConvBackward& args, void* sum, void* sum_xhat) {
  using Acc = Accumulator<T>;
  const ConvShape& s = args.shape;
  const MaskedGradient gradient{args.bn.mean, args.bn.invstd, args.grad, args.relu ? args.y : Rows{}, args.dresidual};
  ConvForward conv = convolution_of(args);
  conv.y = args.dresidual;  // to be judged as what the epilogue writes
  GradientSum<Acc>* partial = nullptr;
  int64_t chunks = 0;
  const auto launched = [&] {
    if constexpr (!std::is_same_v<T, double>) {
      if (s.kt == 1 && rows_out(s) > 0 && !narrow::why_not<T>(conv) && !why_not_packs<T>(s.k, gradient.mask)) {
        partial = queue.template workspace<GradientSum<float>>(kMostPartials * s.k);
        chunks = narrow::sum_gradient<T>(queue, conv, gradient, partial);
        return true;
      }
      if (!tile::why_not(conv) && tile::aligned(gradient.mask, sizeof(T))) {
        const auto of_tiles = tile::sum_gradient<T>(queue, conv, gradient);
        partial = of_tiles.of;
        chunks = of_tiles.count;
        return true;
      }
    }
    return false;
  };
  if (!launched()) {
    const Chunks cuts = cut(rows_out(s), kTile, kMostPartials);
    chunks = cuts.count;
    partial = queue.template workspace<GradientSum<Acc>>(chunks * s.k);
    if (chunks > 0)
      queue.launch(sum_gradient_kernel<T>,
                   {dim3(unsigned(chunks), tiles(queue, s.k)), kThreads, sizeof(ForwardShared<Acc>)}, conv, gradient,
                   cuts, partial);
  }
  const MergePlan plan = merge_plan(chunks, s.k);
  queue.launch(merge_gradient_sums<Acc>, merge_launch(plan, 1, sizeof(BlockValues<GradientSum<Acc>>)), plan, partial,
               static_cast<Acc*>(sum), static_cast<Acc*>(sum_xhat));
}

// These in the storage type that the arguments name: instances.cuh.
template <class Queue>
void forward(Queue& queue, const ConvForward& args, const BatchStats* stats) {
  with_type(args.dtype, [&](auto type) { forward_as<typename decltype(type)::type>(queue, args, stats); });
}

template <class Queue>
void sum_gradient(Queue& queue, const ConvBackward& args, void* sum, void* sum_xhat) {
  with_type(args.dtype, [&](auto type) { sum_gradient_as<typename decltype(type)::type>(queue, args, sum, sum_xhat); });
}

}  // namespace slowfast_fast::cuda
