// What the threads of a CPU operator work on: plain descriptions, made by device.cpp and read by the kernels, which are
// compiled once per instruction set. Every kernel takes a range [begin, end) of independent tasks; how the work is cut
// into tasks depends on the shapes only, never on the number of threads, so that results do not either.
#pragma once
#include "primitives.h"

namespace slowfast_fast::cpu {

// The left operand of a product: activations as they are, or a gradient that is masked and normalised while it is read.
//   plain:       v = rows
//   masked:      v = rows where y > 0, else 0                                           (y present)
//   normalised:  v = factor * g + slope * (raw - mean) + offset, g = rows, masked by the sign of
//                (raw - mean) * factor + beta + residual when there was a ReLU            (raw present)
// The vectors are of the accumulation type, padded to a multiple of `vector_pad`.
struct Source {
  Rows rows;
  Rows y;
  Rows raw, residual;
  bool relu;
  const void *mean, *factor, *beta, *slope, *offset;
};
constexpr int64_t vector_pad = 32;  // at least the channels of the widest panel

// For destination frame t, the pairs (source frame, kernel tap) that it sums, entries first[t] ... first[t + 1].
struct TapTable {
  const int32_t *first, *frame, *tap;
};

// What a block of weights takes of an L1 data cache of 32 KiB.
constexpr int64_t l1_weights = 16 << 10;

// How a product is cut: panels of output channels (the register tile's width), groups of panels, blocks of depth (input
// channels), of positions and of frames.
struct Blocking {
  int64_t panel, k_group, c_block, p_block, t_block;
};

// How a convolution is summed: tap by tap, kernels/winograd.h, or kernels/slide.h.
enum class Method { Direct, Winograd, Slide };

// destination[n, t, p, k] = epilogue(sum over (frame, tap) of t, c of source[n, frame, p, c] * weight[k, c, tap])
// Tasks: frame blocks x position blocks x clips, the panel groups fastest. Forward convolution and dgrad.
struct ConvPlan {
  Dtype dtype;
  int64_t n, p, c, k, t_source, t, kt;
  Source source;
  bool gather;  // copy the source block by block even where it could be read in place
  TapTable taps;
  const void* weight;  // packed: [panel][c block][tap, or 0 ... 3 of winograd][c][channel of the panel], zero-padded
  Method method;       // other than direct: three taps, frame t summing source frames t + lead ... t + lead + 2
  int64_t lead;
  Blocking blocking;
  const void *scale, *shift;  // (k), padded, or nullptr together
  Rows residual;
  bool relu;
  OutRows y;
  double* statistics;  // nullptr, or per row task [mean, M2][k] of the stored values
};

// partial[chunk][panel][tap][c][channel of the panel] = sum over the chunk's rows of x * gradient
// Tasks: panel groups x chunks of position blocks.
struct WgradPlan {
  Dtype dtype;
  int64_t n, p, c, k, t_in, t_out, kt;
  Source x, gradient;
  TapTable taps;  // of the forward
  bool winograd;  // kernels/wgrad.h, with `lead` as in ConvPlan; partial then has four matrices for the three taps
  int64_t lead;
  Blocking blocking;
  int64_t chunks;
  int64_t summed_rows;  // rows that one accumulator sums before it goes into a wider sum
  void* partial;
  bool in_double;  // products and sums of values stored as dtype, Float32 or Float64; partial is double, too
  bool ones;       // the last of x's c channels is not stored: it is 1
};

// Sums the chunks in order: dweight = scale * sum, dscale = sum over (c, tap) of weight * sum. Tasks: panels.
struct WgradResult {
  Dtype dtype;
  int64_t c, k, kt, stride_c, stride_tap, panel, chunks;  // strides of weight and dweight, whose K lie c * kt apart
  bool winograd;
  const void* partial;
  const void *weight, *scale;
  void *dweight, *dscale;  // each may be nullptr
};

// weight[o, r, tap] of the product = from[o * stride_out + r * stride_reduced + tap * stride_tap] * factor[r]; for
// winograd the four transformed matrices. `flip` reverses the taps (dgrad), which otherwise the tap table does. Tasks:
// panels.
struct PackPlan {
  Dtype dtype;
  int64_t out, reduced, kt, stride_out, stride_reduced, stride_tap, panel, c_block;
  bool winograd, flip;
  const void *from, *factor;
  void* to;
};

// A residual block, primitives.h's Bottleneck, in bands: `rows` output rows of `frames` frames, a and b of which a
// thread keeps in its scratch. Tasks: frame blocks x bands x clips, the frame blocks fastest, so that a thread finds
// the frames around its next task in cache.
struct BottleneckPlan {
  Bottleneck block;
  int64_t h_out, w_out;
  int64_t frames, rows;
  const void *weight_a, *weight_b, *weight_c,
      *weight_shortcut;                     // packed: [panel][tap][reduced channel][channel of the panel]
  const void *shift_a, *shift_b, *shift_c;  // padded; shift_c includes the shortcut's
};

// primitives.h's SpatialForward, kernels/spatial.h. Tasks: blocks of `tiles` tiles of 2 x 2 outputs, the tiles of all
// images being one sequence, the panel groups fastest.
struct SpatialPlan {
  Dtype dtype;
  SpatialShape shape;
  Rows x;
  const void* weight;  // packed: [panel][c block][U0 ... U15][c][channel of the panel], zero-padded
  int64_t panel, k_group, c_block, tiles;
  const void* shift;  // padded, or nullptr
  Rows residual;
  bool relu;
  OutRows y;
};

// Its weight from (K, C, 3, 3) of any strides. Tasks: panels.
struct SpatialPackPlan {
  Dtype dtype;
  int64_t k, c, panel, c_block, stride_k, stride_c, stride_h, stride_w;
  const void* from;
  void* to;
};

// The gradient of such a weight, kernels/spatial_wgrad.h: partial[chunk][panel][U0 ... U15][c][channel of the panel].
// Tasks: blocks of C, fastest, and of K, and chunks of `blocks_of_a_chunk` blocks of `tiles` tiles.
struct SpatialWgradPlan {
  Dtype dtype;
  SpatialShape shape;
  Rows x, grad;
  int64_t c_block, k_block, tiles, blocks_of_a_chunk;
  void* partial;
};

// Adds the chunks up in double. Tasks: panels.
struct SpatialWeightGradientPlan {
  Dtype dtype;
  int64_t k, c, panel, chunks, stride_k, stride_c, stride_h, stride_w;
  const void* partial;
  void* to;
};

// Passes over rows; tasks are blocks of `row_block` rows of one frame.
constexpr int64_t row_block = 256;

struct NormalisePlan {
  Dtype dtype;
  int64_t n, t, p, k;
  Rows raw, residual;
  const void *mean, *factor, *beta;  // padded
  bool relu;
  OutRows y;
};

// Per task: sums[task][0][k] = sum of g, sums[task][1][k] = sum of g * (raw - mean); g is also written to dresidual
// when wanted.
struct SumsPlan {
  Dtype dtype;
  int64_t n, t, p, k;
  Source gradient;
  double* sums;
  OutRows dresidual;
};

// Per task [mean, M2][k] of its rows.
struct MomentsPlan {
  Dtype dtype;
  int64_t n, t, p, k;
  Rows raw;
  double* moments;
};

// y = x mixing + shift for rows of c floats, in double.
struct MixPlan {
  int64_t n, t, p, c;
  Rows x;
  const double* mixing;  // [input channel][c, padded to a multiple of vector_pad]
  const double* shift;   // padded alike
  OutRows y;

  int64_t padded() const { return (c + vector_pad - 1) / vector_pad * vector_pad; }
};

// to = the gradient as products read it.
struct GradientPlan {
  Dtype dtype;
  int64_t n, t, p, k;
  Source gradient;
  OutRows to;
};

// max_pool of x as it is, or where there is a factor, of act((x - mean) * factor + beta). Tasks: rows of the result's
// images.
struct PoolPlan {
  MaxPool pool;
  const void *mean, *factor, *beta;  // padded
  bool relu;
};

// The windows' part in the backward of PoolPlan. Tasks as there.
struct PoolSumsPlan {
  PoolPlan forward;
  Rows grad;
  uint8_t* place;  // of the maximum, [n][t][h_out][w_out][c]: row by row in its window, or none
  double* sums;    // as in SumsPlan
  static constexpr uint8_t none = most_window;
};

// dx = factor * (the sum of grad over the windows whose maximum is here) + slope * (x - mean) + offset. Tasks: rows of
// images of x.
struct PoolGradientPlan {
  PoolPlan forward;
  Rows grad;
  const uint8_t* place;
  const void *slope, *offset;  // padded
  OutRows dx;
};

// A stem's convolution in bands of output rows. Forward tasks: bands x clips. wgrad tasks: chunks of them.
struct StemPlan {
  Dtype dtype;
  StemShape shape;
  StridedClips x;
  int64_t band;        // output rows
  const void* weight;  // packed: [panel][tap in T][tap in H][tap in W][c][channel of the panel], zero-padded
  const void* shift;   // padded, or nullptr
  bool relu;
  OutRows y;
  Source gradient;
  int64_t chunk;    // bands
  double* partial;  // per chunk a sum laid out as the packed weight

  // Values of the padded row of pixels that the windows of a row of outputs see.
  int64_t row_length() const { return ((shape.out[2] - 1) * shape.stride[2] + shape.kernel[2]) * shape.c; }
};

struct TileShape {
  int64_t rows, panel;
};

struct Kernels {
  const char* name;
  TileShape (*tile)(Dtype, int64_t k);
  TileShape (*slide_tile)();
  int64_t (*pack_scratch)(const PackPlan&);  // bytes a thread needs
  void (*pack)(const PackPlan&, int64_t, int64_t, void* scratch);
  int64_t (*conv_scratch)(const ConvPlan&);
  void (*conv)(const ConvPlan&, int64_t, int64_t, void* scratch);
  int64_t (*wgrad_scratch)(const WgradPlan&);
  void (*wgrad)(const WgradPlan&, int64_t, int64_t, void* scratch);
  void (*wgrad_result)(const WgradResult&, int64_t, int64_t);
  int64_t (*bottleneck_scratch)(const BottleneckPlan&);
  void (*bottleneck)(const BottleneckPlan&, int64_t, int64_t, void* scratch);
  int64_t (*stem_scratch)(const StemPlan&);
  void (*stem)(const StemPlan&, int64_t, int64_t, void* scratch);
  int64_t (*stem_wgrad_scratch)(const StemPlan&);
  void (*stem_wgrad)(const StemPlan&, int64_t, int64_t, void* scratch);
  void (*pack_spatial)(const SpatialPackPlan&, int64_t, int64_t);
  int64_t (*spatial_scratch)(const SpatialPlan&);
  void (*spatial)(const SpatialPlan&, int64_t, int64_t, void* scratch);
  int64_t (*spatial_wgrad_scratch)(const SpatialWgradPlan&);
  void (*spatial_wgrad)(const SpatialWgradPlan&, int64_t, int64_t, void* scratch);
  void (*spatial_weight_gradient)(const SpatialWeightGradientPlan&, int64_t, int64_t);
  void (*normalise)(const NormalisePlan&, int64_t, int64_t);
  void (*sums)(const SumsPlan&, int64_t, int64_t);
  void (*moments)(const MomentsPlan&, int64_t, int64_t);
  void (*mix)(const MixPlan&, int64_t, int64_t);
  void (*gradient)(const GradientPlan&, int64_t, int64_t);
  void (*max_pool)(const PoolPlan&, int64_t, int64_t);
  void (*pool_sums)(const PoolSumsPlan&, int64_t, int64_t);
  void (*pool_gradient)(const PoolGradientPlan&, int64_t, int64_t);
  void (*pack_pathways)(const PackPathways&, int64_t, int64_t);  // tasks: rows of pixels of every frame
};

namespace baseline {
const Kernels& kernels();
}
#if defined(SFF_HAVE_X86_ISAS)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
#endif

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace slowfast_fast::cpu
