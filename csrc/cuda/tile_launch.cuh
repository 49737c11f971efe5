// When the tiled kernels can run, in which sizes, and their launches. A function that returns false has done nothing:
// the caller takes the general kernels.
#pragma once
#include <string>

#include "tile_kernels.cuh"

namespace slowfast_fast::cuda::tile {

enum class Size { Wide, Tall, Small };

struct Plan {
  Size size;
  int parts;  // of the depth, in different blocks
};

// What a grid has to fill: two blocks on each SM of an H100 or H200. A constant, not asked of the device, because the
// number of parts decides how a sum is rounded, and results should not depend on where they were computed.
constexpr int64_t kSMs = 132, kFullGrid = 2 * kSMs;
constexpr int64_t kLeastPart = 8;   // tiles of depth in a part: the pipeline's start and the part's sums cost about two
constexpr int64_t kMostParts = 16;  // that finish_kernel adds, one after another
// Rows of a chunk in wgrad. Fewer do not pay for writing its sums, more let the rounding errors of a long float32 sum
// grow.
constexpr int64_t kLeastWgradRows = 512, kMostWgradRows = 1 << 15;

constexpr int64_t kMostRows = 1 << 30, kMostFrames = 1 << 28;  // what 32-bit places are computed with

template <class Pointer>
bool aligned(const RowsOf<Pointer>& rows, int64_t element) {
  const auto multiple = [](int64_t bytes) { return bytes % kChunkBytes == 0; };
  return multiple(int64_t(reinterpret_cast<uintptr_t>(rows.data))) && multiple(rows.stride_n * element) &&
         multiple(rows.stride_t * element) && multiple(rows.stride_p * element);
}

// Why these kernels do not take a convolution, whatever its tensors; nullptr if they do.
inline const char* why_not(const ConvShape& s, Dtype dtype) {
  if (dtype == Dtype::Float64) return "float64 has no tiled kernels";
  const int64_t chunk = kChunkBytes / (dtype == Dtype::Float32 ? 4 : 2);
  if (s.c % chunk || s.k % chunk) return "C or K is no multiple of 16 bytes";
  if (rows_in(s) == 0 || rows_out(s) == 0 || s.c == 0) return "there is nothing to multiply";
  if (std::max(rows_in(s), rows_out(s)) > kMostRows || std::max(s.c, s.k) > kMostRows)
    return "more than 2^30 rows or channels";
  if (s.t_in + s.padding + s.t_out * s.stride + s.kt * s.dilation > kMostFrames) return "more than 2^28 frames";
  if (ceil_div(std::max(rows_in(s), rows_out(s)), Small::kRows) * ceil_div(std::max(s.c, s.k), Small::kColumns) >
      kMostRows)
    return "more than 2^30 tiles";
  return nullptr;
}

inline const char* why_not_dgrad(const ConvShape& s) {
  return s.stride > 1 && s.dilation > 1 ? "dgrad with both a stride and a dilation" : nullptr;
}

constexpr const char* kMisaligned = "a tensor's begin or a stride is no multiple of 16 bytes";

inline const char* why_not(const ConvForward& args) {
  if (const char* why = why_not(args.shape, args.dtype)) return why;
  const int64_t element = args.dtype == Dtype::Float32 ? 4 : 2;
  return aligned(args.x, element) && aligned(args.residual, element) && aligned(args.y, element) ? nullptr
                                                                                                 : kMisaligned;
}

inline const char* why_not(const ConvBackward& args) {
  if (const char* why = why_not(args.shape, args.dtype)) return why;
  const int64_t element = args.dtype == Dtype::Float32 ? 4 : 2;
  return aligned(args.grad, element) && aligned(args.x, element) && aligned(args.y, element) &&
                 aligned(args.bn.raw, element) && aligned(args.bn.residual, element) && aligned(args.dconv, element) &&
                 aligned(args.dx_residual, element) && aligned(args.dx, element)
             ? nullptr
             : kMisaligned;
}

// Whether the largest tiles fit the registers: 4-byte operands that lie along the outer index are read word by word,
// from more addresses.
template <class Math, Major weight_major>
constexpr bool kTakesWide = sizeof(typename Math::T) == 2 || weight_major == Major::Depth;

// The largest tiles of which there are enough for every SM; the depth of the smallest is split where there are not.
inline Plan plan(int64_t rows, int64_t outers, int64_t blocks, bool takes_wide) {
  const auto count = [&](auto shape) {
    using Shape = decltype(shape);
    return ceil_div(rows, Shape::kRows) * ceil_div(outers, Shape::kColumns);
  };
  if (takes_wide && outers > Tall::kColumns && count(Wide{}) >= kSMs) return {Size::Wide, 1};
  if (count(Tall{}) >= kSMs) return {Size::Tall, 1};
  const int64_t parts = std::min({kFullGrid / count(Small{}), blocks / kLeastPart, kMostParts});
  return {Size::Small, int(std::max<int64_t>(1, parts))};
}

// Calls f(Math{}) with the arithmetic for products of T.
template <class T, class F>
void with_math(bool tf32, F&& f) {
  if constexpr (!std::is_same_v<T, float>) f(TensorCores<T, false>{});
  else if (tf32) f(TensorCores<T, true>{});
  else f(Fma{});
}

// Calls f(Shape{}). Float32 without TF32 is bound by FMA, not by what feeds it: one shape serves it.
template <class Math, Major weight_major, class F>
void with_shape(Size size, F&& f) {
  if constexpr (std::is_same_v<Math, Fma>) {
    f(Exact{});
  } else {
    if (size == Size::Small) return f(Small{});
    if constexpr (kTakesWide<Math, weight_major>)
      if (size == Size::Wide) return f(Wide{});
    f(Tall{});
  }
}

// What is gathered of tiles of rows: values (count, outers).
template <class Value>
struct Partial {
  Value* of = nullptr;
  int64_t count = 0;
};

// The product of the rows that the problem gathers with the weight, and its epilogue, in which `gathered` is where it
// leaves what it gathers; nullptr: nothing.
template <class Math, Major weight_major, class Queue, class Value = Moments<float>>
Partial<Value> multiply_rows(Queue& queue, Product args, Value* Epilogue::* gathered = nullptr) {
  using T = typename Math::T;
  const Problem& problem = args.problem;
  Partial<Value> partial;
  const int64_t blocks = ceil_div(problem.depth, kDepth<T>) * problem.terms;
  const Plan chosen = queue.plan(plan(problem.rows, problem.outers, blocks, kTakesWide<Math, weight_major>));
  with_shape<Math, weight_major>(chosen.size, [&](auto shape) {
    using Shape = decltype(shape);
    const bool split = chosen.parts > 1;
    if (gathered) {
      partial.count = ceil_div(problem.rows, split ? kFinishRows : Shape::kRows);
      partial.of = queue.template workspace<Value>(partial.count * problem.outers);
      args.epilogue.*gathered = partial.of;
    }
    args.parts = {nullptr, chosen.parts};
    if (split) args.parts.sums = queue.template workspace<float>(int64_t(chosen.parts) * problem.rows * problem.outers);
    const int64_t tiles = ceil_div(problem.rows, Shape::kRows) * ceil_div(problem.outers, Shape::kColumns);
    queue.launch(tile_product_kernel<Math, Shape, weight_major>,
                 {dim3(unsigned(tiles), unsigned(chosen.parts)), kThreads, sizeof(ProductShared<T, Shape>)}, args);
    if (split)
      queue.launch(finish_kernel<T>,
                   {dim3(unsigned(ceil_div(problem.rows, kFinishRows) * ceil_div(problem.outers, kFinishColumns))),
                    kThreads, sizeof(GatherScratch<T, kFinishColumns>)},
                   problem, args.epilogue, args.parts);
  });
  return partial;
}

template <class T, class Queue>
void launch_pack(Queue& queue, const ConvShape& s, const void* weight, const void* scale, T* to) {
  queue.launch(pack_weight<T>, element_launch(s.k * s.kt * s.c), s, weight, scale, to);
}

// The weight as (K, kt, C), times scale(k) if given. As it is, where that is what it is.
template <class T, class Queue>
const void* packed_weight(Queue& queue, const ConvShape& s, const void* weight, const void* scale) {
  if (s.kt == 1 && !scale && reinterpret_cast<uintptr_t>(weight) % kChunkBytes == 0) return weight;
  T* packed = queue.template workspace<T>(s.k * s.kt * s.c);
  launch_pack<T>(queue, s, weight, scale, packed);
  return packed;
}

// But for its epilogue.
template <class T, class Queue>
Product forward_product(Queue& queue, const ConvForward& args) {
  const ConvShape& s = args.shape;
  Product product{};
  product.problem = {int(rows_out(s)), int(s.t_out), int(s.p),  0, 1, -int(s.padding), int(s.stride),
                     int(s.dilation),  int(s.t_in),  int(s.kt), 0, 1, int(s.c),        int(s.k)};
  product.source = args.x;
  product.weight = args.packed ? args.packed : packed_weight<T>(queue, s, args.weight, nullptr);
  product.kt = int(s.kt);
  return product;
}

template <class T, class Queue>
bool forward(Queue& queue, const ConvForward& args, const BatchStats* stats) {
  if constexpr (!std::is_same_v<T, double>) {
    if (why_not(args)) return false;
    const ConvShape& s = args.shape;
    Product product = forward_product<T>(queue, args);
    product.epilogue.centre = args.centre;
    product.epilogue.scale = args.scale;
    product.epilogue.shift = args.shift;
    product.epilogue.residual = args.residual;
    product.epilogue.residual_scale = args.residual_scale;
    product.epilogue.relu = args.relu;
    product.epilogue.out = args.y;
    with_math<T>(args.tf32, [&](auto math) {
      const auto partial =
          multiply_rows<decltype(math), Major::Depth>(queue, product, stats ? &Epilogue::moments : nullptr);
      if (stats) launch_merge_statistics(queue, partial.of, partial.count, s.k, rows_out(s), *stats);
    });
    return true;
  }
  return false;
}

// args: the convolution alone, whose output is not stored.
template <class T, class Queue>
Partial<GradientSum<float>> sum_gradient(Queue& queue, const ConvForward& args, const MaskedGradient& gradient) {
  Product product = forward_product<T>(queue, args);
  product.epilogue.gradient = gradient;
  Partial<GradientSum<float>> partial;
  with_math<T>(args.tf32, [&](auto math) {
    partial = multiply_rows<decltype(math), Major::Depth>(queue, product, &Epilogue::gradient_sums);
  });
  return partial;
}

// args with the gradient of the convolution's output, as gradient.cuh leaves them. Every tile of both products would
// otherwise form it anew, kt * C / 128 times in dgrad, in instructions that compete with those that feed the tensor
// cores.
template <class T, class Queue>
void dgrad(Queue& queue, const ConvBackward& args) {
  const ConvShape& s = args.shape;
  Product product{};
  product.source = args.grad;
  product.weight = packed_weight<T>(queue, s, args.weight, args.scale);
  product.kt = int(s.kt);
  product.epilogue.residual = args.dx_residual;
  product.epilogue.out = args.dx;
  for (int64_t residue = 0; residue < s.stride; ++residue) {
    const int64_t first = ((residue - s.padding) % s.stride + s.stride) % s.stride;
    if (first >= s.t_in) continue;
    const int64_t frames = ceil_div(s.t_in - first, s.stride);
    product.problem = {int(s.n * frames * s.p),
                       int(frames),
                       int(s.p),
                       int(first),
                       int(s.stride),
                       int((first + s.padding - residue) / s.stride),
                       1,
                       s.stride == 1 ? -int(s.dilation) : -1,
                       int(s.t_out),
                       int(residue < s.kt ? ceil_div(s.kt - residue, s.stride) : 0),
                       int(residue),
                       int(s.stride),
                       int(s.k),
                       int(s.c)};
    with_math<T>(args.tf32, [&](auto math) { multiply_rows<decltype(math), Major::Outer>(queue, product); });
  }
}

template <class Math>
using WgradShape = std::conditional_t<std::is_same_v<Math, Fma>, Exact,
                                      std::conditional_t<kTakesWide<Math, Major::Outer>, Wide, Scattered>>;

template <class Shape>
int64_t wgrad_tiles(const ConvShape& s) {
  return ceil_div(s.k, Shape::kRows) * ceil_div(s.c, Shape::kColumns) * s.kt;
}

template <class Shape>
Chunks wgrad_chunks(const ConvShape& s) {
  const int64_t fill = kFullGrid / wgrad_tiles<Shape>(s), long_enough = ceil_div(rows_out(s), kMostWgradRows);
  return cut(rows_out(s), kLeastWgradRows, std::max({int64_t(1), fill, long_enough}));
}

// args as for dgrad. scale_product: see finish_wgrad.
template <class T, class Queue>
void wgrad(Queue& queue, const ConvBackward& args, float* scale_product) {
  const ConvShape& s = args.shape;
  with_math<T>(args.tf32, [&](auto math) {
    using Math = decltype(math);
    using Shape = WgradShape<Math>;
    const Chunks chunks = wgrad_chunks<Shape>(s);
    float* partial = queue.template workspace<float>(chunks.count * s.k * s.kt * s.c);
    queue.launch(tile_wgrad_kernel<Math, Shape>,
                 {dim3(unsigned(wgrad_tiles<Shape>(s)), unsigned(chunks.count)), kThreads, sizeof(WgradShared<Shape>)},
                 args, chunks, partial);
    launch_merge_wgrad<T>(queue, args, partial, chunks.count, scale_product);
  });
}

// The above in words.

template <class Math, class Shape>
std::string describe(int64_t parts, const char* of) {
  const char* how = std::is_same_v<Math, Fma>       ? "FMA"
                    : sizeof(typename Math::T) == 4 ? "TF32 tensor cores"
                                                    : "tensor cores";
  const std::string size = std::to_string(Shape::kRows) + " x " + std::to_string(Shape::kColumns) + " tiles on " + how;
  return size + (parts > 1 ? ", " + std::to_string(parts) + " parts of the " + of : "");
}

template <class T, Major weight_major>
std::string describe_rows(int64_t rows, int64_t outers, int64_t depth, int64_t terms, bool tf32) {
  std::string text;
  with_math<T>(tf32, [&](auto math) {
    using Math = decltype(math);
    const Plan chosen = plan(rows, outers, ceil_div(depth, kDepth<T>) * terms, kTakesWide<Math, weight_major>);
    with_shape<Math, weight_major>(chosen.size,
                                   [&](auto shape) { text = describe<Math, decltype(shape)>(chosen.parts, "depth"); });
  });
  return text;
}

template <class T>
std::string describe_wgrad(const ConvShape& s, bool tf32) {
  std::string text;
  with_math<T>(tf32, [&](auto math) {
    using Shape = WgradShape<decltype(math)>;
    text = describe<decltype(math), Shape>(wgrad_chunks<Shape>(s).count, "rows");
  });
  return text;
}

}  // namespace slowfast_fast::cuda::tile
