// Carries out primitives.h as kernel launches. A Queue orders these on a device:
//   queue.launch(kernel, Launch, arguments...)   runs after what was launched before
//   queue.template workspace<Value>(count)       device memory that outlives the launches
//   queue.plan(tile::Plan)                       that plan, unless a test wants another one
//   queue.items(count)                           likewise: into how many items a bottleneck should be cut
// Nothing here asks the device for anything, so every primitive can be captured in a CUDA graph.
#pragma once
#include "backward.cuh"
#include "forward_launch.cuh"
#include "narrow_wgrad_launch.cuh"
#include "pathways.cuh"
#include "pool.cuh"
#include "recompute.cuh"
#include "rowwise.cuh"

namespace slowfast_fast::cuda {

constexpr int64_t kWgradRows =
    8 * kDepth;  // rows of a chunk at least, so that its work outweighs writing its partial result

inline unsigned channel_groups(int64_t channels) { return unsigned(ceil_div(channels, kLanes)); }

template <class T, class Queue>
void backward_as(Queue& queue, const ConvBackward& args) {
  using Acc = Accumulator<T>;
  const ConvShape& s = args.shape;
  if (args.bn.mean && !args.bn.raw.data && rows_out(s) > 0) {
    const ConvBackward left = recomputed_gradient<T>(queue, args);
    if (left.dx.data || left.dweight) backward_as<T>(queue, left);
    return;
  }
  const bool normalises = args.bn.raw.data;
  auto* dscale = static_cast<Acc*>(args.dscale);

  // The sums over rows: results in themselves, and in the BatchNorm form needed by both products.
  auto* sum = static_cast<Acc*>(args.dshift);
  Acc* sum_xhat = normalises ? dscale : nullptr;
  if (normalises && (args.dx.data || args.dweight || args.dconv.data)) {
    if (!sum) sum = queue.template workspace<Acc>(s.k);
    if (!sum_xhat) sum_xhat = queue.template workspace<Acc>(s.k);
  }
  if (sum || sum_xhat || args.dresidual.data) {
    const bool by_packs = !why_not_rows<T>(args);
    const RowPlan rows = by_packs ? gradient_plan<T>(args) : RowPlan{};
    const Chunks chunks = by_packs ? rows.chunks : cut(rows_out(s), kRowLanes, kMostPartials);
    Acc* partial = sum ? queue.template workspace<Acc>(chunks.count * s.k) : nullptr;
    Acc* partial_xhat = sum_xhat ? queue.template workspace<Acc>(chunks.count * s.k) : nullptr;
    if (chunks.count > 0 && by_packs) launch_gradient_rows<T>(queue, args, rows, partial, partial_xhat);
    else if (chunks.count > 0)
      queue.launch(gradient_sums<T>,
                   {dim3(channel_groups(s.k), unsigned(chunks.count)), kReduceThreads, sizeof(BlockValues<Acc>)}, args,
                   chunks, partial, partial_xhat);
    ChunkSum<Acc> sums[] = {{partial, sum}, {partial_xhat, sum_xhat}};
    if (!sum) std::swap(sums[0], sums[1]);
    const MergePlan plan = merge_plan(chunks.count, s.k);
    if (sum || sum_xhat)
      queue.launch(sum_chunks<Acc>, merge_launch(plan, sum && sum_xhat ? 2 : 1, sizeof(BlockValues<Acc>)), plan,
                   sums[0], sums[1]);
  }

  Acc* scale_product = normalises ? nullptr : dscale;
  bool dx_wanted = args.dx.data && rows_in(s) > 0, dweight_wanted = args.dweight || scale_product;
  ConvBackward left = past_relu(args);  // what is left to do
  if constexpr (!std::is_same_v<T, double>) {
    const bool tiled = !tile::why_not(args), narrow_dgrad = tiled && !narrow::why_not_dgrad<T>(args);
    const bool tiled_dgrad = tiled && dx_wanted && (narrow_dgrad || !tile::why_not_dgrad(s));
    if (tiled_dgrad || (tiled && dweight_wanted)) {
      const bool narrow_wgrad = dweight_wanted && !narrow::why_not_wgrad<T>(left);
      // A narrow wgrad reads each row once, so it is the one to form the gradient, and dgrad reads what it leaves.
      if (!narrow_wgrad || !narrow::forms_gradient(left)) left = with_output_gradient<T>(queue, left, sum, sum_xhat);
      if (narrow_wgrad) {
        OutRows gradient{};
        if (narrow::forms_gradient(left) && args.dconv.data) gradient = args.dconv;
        else if (narrow::forms_gradient(left) && tiled_dgrad) gradient = gradient_workspace<T>(queue, s);
        const auto partial = narrow::launch_wgrad<T>(queue, left, sum, sum_xhat, gradient);
        left = with_gradient(left, gradient.data ? as_input(gradient) : left.grad);
        launch_merge_wgrad<T>(queue, left, partial.of, partial.chunks, scale_product);
      } else if (dweight_wanted) {
        tile::wgrad<T>(queue, left, scale_product);
      }
      if (tiled_dgrad) narrow_dgrad ? narrow::dgrad<T>(queue, left) : tile::dgrad<T>(queue, left);
      dx_wanted = dx_wanted && !tiled_dgrad;
      dweight_wanted = false;
    }
  }
  if (args.dconv.data && rows_out(s) > 0) left = with_output_gradient<T>(queue, left, sum, sum_xhat);

  if (dx_wanted) {
    const Chunks chunks = cut(rows_in(s), kTile, kMostBlocks);
    queue.launch(dgrad_kernel<T>, {dim3(unsigned(chunks.count), tiles(queue, s.c)), kThreads, sizeof(Tiles<Acc>)}, left,
                 chunks, sum, sum_xhat);
  }

  if (dweight_wanted) {
    const int64_t taps = s.kt * s.c, tiles_in_all = ceil_div(s.k, kTile) * ceil_div(taps, kTile);
    const Chunks chunks = cut(rows_out(s), kWgradRows, ceil_div(kMostPartials, tiles_in_all));
    Acc* partial = queue.template workspace<Acc>(chunks.count * s.k * taps);
    if (chunks.count > 0)
      queue.launch(wgrad_kernel<T>,
                   {dim3(unsigned(chunks.count), tiles(queue, s.k), tiles(queue, taps)), kThreads, sizeof(Tiles<Acc>)},
                   left, chunks, sum, sum_xhat, partial);
    launch_merge_wgrad<T>(queue, left, partial, chunks.count, scale_product);
  }
}

template <class T, class Queue>
void normalise_as(Queue& queue, const Normalise& args) {
  const int64_t elements = args.n * args.t * args.p * args.k;
  if (elements > 0 && !why_not_rows<T>(args)) return launch_rows<T>(queue, args);
  if (elements > 0) queue.launch(normalise_kernel<T>, element_launch(elements), args);
}

template <class T, class Queue>
void copy_as(Queue& queue, const CopyRows& args) {
  const int64_t elements = args.n * args.t * args.p * args.c;
  if (elements > 0 && !why_not_rows<T>(args)) return launch_rows<T>(queue, args);
  if (elements > 0) queue.launch(copy_kernel<T>, element_launch(elements), args);
}

template <class T, class Queue>
void fold_as(Queue& queue, const FoldBatchNorm& args) {
  queue.launch(fold_kernel<Accumulator<T>>, element_launch(args.k), args);
}

template <class T, class Queue>
void update_running_as(Queue& queue, const RunningStats& args) {
  queue.launch(update_running_kernel<T>, {dim3(1), kElementThreads, sizeof(double)}, args);
}

template <class T, class Queue>
void pack_as(Queue& queue, const ConvForward& args, void* to) {
  if constexpr (!std::is_same_v<T, double>)
    tile::launch_pack<T>(queue, args.shape, args.weight, nullptr, static_cast<T*>(to));
}

// The tiled kernels read a weight of several taps as (K, kt, C); the others, and a weight of one tap, as it is.
inline int64_t packed_bytes(const ConvForward& args) {
  const ConvShape& s = args.shape;
  if (s.kt == 1 || args.dtype == Dtype::Float64) return 0;
  return s.k * s.kt * s.c * (args.dtype == Dtype::Float32 ? 4 : 2);
}

// These in the storage type that the arguments name, each as much to compile as all of a forward pass: instances.cuh.
template <class Queue>
void backward(Queue& queue, const ConvBackward& args) {
  with_type(args.dtype, [&](auto type) { backward_as<typename decltype(type)::type>(queue, args); });
}

template <class Queue>
void normalise_pool_backward(Queue& queue, const NormalisePoolBackward& args) {
  with_type(args.forward.pool.dtype,
            [&](auto type) { normalise_pool_backward_as<typename decltype(type)::type>(queue, args); });
}

}  // namespace slowfast_fast::cuda
