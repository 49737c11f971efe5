#include "../spatial_conv.h"

#include <algorithm>
#include <type_traits>

#include "device.h"
#include "support.h"

namespace slowfast_fast {
namespace {

using namespace cpu;

// Channels that one accumulator sums: with 512 the error would be more than twice that of a library that sums in parts.
// A matrix of them is half of what weights may take of L1.
constexpr int64_t longest_chain = 128;
// The transformed input of a task, in half of an L2 cache of 512 KiB, and the unfinished sums of its panels where the
// channels take several blocks, which pass from L3 and back once a block. Measured with 64 to 512 channels on AVX2: the
// more tiles and panels share them, the less often weights, which are 16/9 of the size that they have in memory, and
// images are read.
constexpr int64_t transformed_bytes = 256 << 10, sums_bytes = 512 << 10;
// Tasks that there should be, so that any small number of threads gets even shares.
constexpr int64_t least_tasks = 16;
constexpr int64_t matrices = 16;
constexpr int64_t packed_part = 4 << 20;  // bytes, of an L3 that is larger
// wgrad: blocks of channels of either side, whose transforms weigh little next to their products; the tiles of both
// then take three quarters of L2. 64 blocks of tiles are the most that one chunk adds up in single precision.
constexpr int64_t wgrad_channels = 64, wgrad_bytes = 384 << 10, longest_chunk = 64;

SpatialPlan spatial_plan(const SpatialForward& args) {
  const SpatialShape& s = args.shape;
  const TileShape tile = kernels().tile(args.dtype, s.k);
  const int64_t size = static_cast<int64_t>(acc_size(args.dtype)), panels = ceil_div(s.k, tile.panel);
  SpatialPlan plan = plan_of<SpatialPlan>(args);
  plan.residual = args.residual;
  plan.relu = args.relu;
  plan.y = args.y;
  plan.panel = tile.panel;
  plan.c_block = std::min(s.c, longest_chain);
  const int64_t all = s.tiles();
  const int64_t most = std::max<int64_t>(1, transformed_bytes / (matrices * plan.c_block * size) / tile.rows);
  plan.tiles = std::max<int64_t>(1, std::min(most * tile.rows, all));
  // Groups of panels read and transform the images anew, which costs little next to the products of wide layers.
  int64_t group = panels;
  if (s.c > plan.c_block) group = std::max<int64_t>(1, sums_bytes / (matrices * plan.tiles * tile.panel * size));
  const int64_t blocks = std::max<int64_t>(1, ceil_div(all, plan.tiles));
  plan.k_group =
      tile.panel * std::max<int64_t>(1, std::min(group, panels / std::max<int64_t>(1, least_tasks / blocks)));
  return plan;
}

int64_t packed_size(const SpatialPlan& plan) {
  return ceil_div(plan.shape.k, plan.panel) * plan.panel * plan.shape.c * matrices *
         static_cast<int64_t>(acc_size(plan.dtype));
}

void pack_weight(const SpatialForward& args, const SpatialPlan& plan, void* to) {
  const SpatialPackPlan pack{
      args.dtype,    args.shape.k,  args.shape.c, plan.panel, plan.c_block, args.stride_k, args.stride_c,
      args.stride_h, args.stride_w, args.weight,  to};
  parallel(ceil_div(args.shape.k, plan.panel),
           [&](int64_t begin, int64_t end) { kernels().pack_spatial(pack, begin, end); });
}

void run(const SpatialPlan& plan) {
  parallel(ceil_div(plan.shape.tiles(), plan.tiles) * ceil_div(plan.shape.k, plan.k_group),
           kernels().spatial_scratch(plan),
           [&](int64_t begin, int64_t end, void* scratch) { kernels().spatial(plan, begin, end, scratch); });
}

// The part of a call that output channels [first, first + count) are.
SpatialForward part_of(SpatialForward args, int64_t first, int64_t count) {
  const int64_t size = static_cast<int64_t>(storage_size(args.dtype));
  const auto on = [](auto pointer, int64_t bytes) {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(pointer)>>, const char, char>;
    return pointer ? static_cast<Byte*>(pointer) + bytes : nullptr;
  };
  args.shape.k = count;
  args.weight = on(args.weight, first * args.stride_k * size);
  args.shift = on(args.shift, first * static_cast<int64_t>(acc_size(args.dtype)));
  args.residual.data = on(args.residual.data, first * size);
  args.y.data = on(args.y.data, first * size);
  return args;
}

}  // namespace

void Cpu::spatial(const SpatialForward& args) {
  SpatialPlan plan = spatial_plan(args);
  const PaddedVector shift(args.dtype, args.shape.k, args.shift, 0);
  if (args.shift) plan.shift = shift.get();
  if (args.packed) {
    plan.weight = args.packed;
    run(plan);
    return;
  }
  // A weight that is packed for this call alone is so in parts that stay in cache.
  const int64_t panels = std::max<int64_t>(1, packed_part / (packed_size(plan) / ceil_div(args.shape.k, plan.panel)));
  const int64_t channels = std::min(panels * plan.panel, args.shape.k);
  const Buffer packed(static_cast<size_t>(packed_size(plan) / ceil_div(args.shape.k, plan.panel) * panels));
  for (int64_t first = 0; first < args.shape.k; first += channels) {
    const SpatialForward part = part_of(args, first, std::min(channels, args.shape.k - first));
    SpatialPlan part_plan = spatial_plan(part);
    part_plan.weight = packed.get();
    if (args.shift)
      part_plan.shift = static_cast<char*>(shift.get()) + first * static_cast<int64_t>(acc_size(args.dtype));
    pack_weight(part, part_plan, packed.get());
    run(part_plan);
  }
}

void Cpu::spatial_wgrad(const SpatialWgrad& args) {
  const SpatialShape& s = args.shape;
  const TileShape tile = kernels().tile(args.dtype, s.k);
  const int64_t size = static_cast<int64_t>(acc_size(args.dtype)), panels = ceil_div(s.k, tile.panel);
  SpatialWgradPlan plan = plan_of<SpatialWgradPlan>(args);
  plan.grad = args.grad;
  plan.c_block = std::min(s.c, wgrad_channels);
  plan.k_block = tile.panel * std::min(panels, ceil_div(wgrad_channels, tile.panel));
  const int64_t all = s.tiles();
  plan.tiles = std::min(all, wgrad_bytes / (matrices * (plan.c_block + plan.k_block) * size));
  const int64_t blocks = ceil_div(all, plan.tiles), groups = ceil_div(s.c, plan.c_block) * ceil_div(s.k, plan.k_block);
  const int64_t least = std::max(ceil_div(least_tasks, groups), ceil_div(blocks, longest_chunk));
  plan.blocks_of_a_chunk = std::max<int64_t>(1, blocks / least);
  const int64_t chunks = ceil_div(blocks, plan.blocks_of_a_chunk);
  const Buffer partial(static_cast<size_t>(chunks * panels * tile.panel * matrices * s.c * size));
  plan.partial = partial.get();
  parallel(groups * chunks, kernels().spatial_wgrad_scratch(plan),
           [&](int64_t begin, int64_t end, void* scratch) { kernels().spatial_wgrad(plan, begin, end, scratch); });
  const SpatialWeightGradientPlan result{args.dtype,    args.shape.k,  args.shape.c,  tile.panel,
                                         chunks,        args.stride_k, args.stride_c, args.stride_h,
                                         args.stride_w, partial.get(), args.dweight};
  parallel(panels, [&](int64_t begin, int64_t end) { kernels().spatial_weight_gradient(result, begin, end); });
}

int64_t Cpu::packed_bytes(const SpatialForward& args) { return packed_size(spatial_plan(args)); }

void Cpu::pack(const SpatialForward& args, void* to) { pack_weight(args, spatial_plan(args), to); }

}  // namespace slowfast_fast

STABLE_TORCH_LIBRARY_IMPL(slowfast_fast, CPU, m) { slowfast_fast::register_spatial_conv<slowfast_fast::Cpu>(m); }
