// Decoded frames as the input of both pathways, a thread for every 16 bytes of a result where rows of pixels allow it,
// else for every value.
#pragma once
#include "elementwise.cuh"
#include "pack.cuh"

namespace slowfast_fast::cuda {

// Frames of one launch, whose slow copies the kernel finds in its arguments: no table has to reach the device first.
constexpr int kPathwayFrames = 256;

template <class Acc>
struct FrameRun {
  PackPathways args;  // first is nullptr: a pointer of the host
  Acc scale[3], shift[3];
  int64_t begin, count;
  int first[kPathwayFrames + 1];
};
static_assert(sizeof(FrameRun<double>) <= 4096, "what a kernel's arguments may take before CUDA 12.1");

// kWidth adjacent values a thread, which divide the values of a row of pixels; adjacent threads have adjacent values.
template <class T, int kWidth>
__global__ void __launch_bounds__(kElementThreads) pack_pathways_kernel(FrameRun<Accumulator<T>> run) {
  using Acc = Accumulator<T>;
  const PackPathways& args = run.args;
  const int64_t groups = 3 * args.w / kWidth, elements = args.n * run.count * args.h * groups;
  for (int64_t i = first_element(); i < elements; i += element_step()) {
    const Position at = position_of(i / groups, run.count, args.h);  // p: the row of pixels
    const int64_t column = i % groups * kWidth, t = run.begin + at.t;
    uint8_t bytes[kWidth];
    const uint8_t* from = args.frames + at.n * args.stride_n + t * args.stride_t + at.p * args.stride_h + column;
    if constexpr (kWidth == 1) bytes[0] = *from;
    else load_values(bytes, from);
    T values[kWidth];
    Acc scale[3], shift[3];  // from this thread's first colour on
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      scale[c] = run.scale[(column + c) % 3];
      shift[c] = run.shift[(column + c) % 3];
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) values[e] = T(fma(Acc(bytes[e]), scale[e % 3], shift[e % 3]));
    const auto store = [&](void* to, int64_t frames, int64_t frame) {
      T* row = static_cast<T*>(to) + ((at.n * frames + frame) * args.h + at.p) * 3 * args.w + column;
      if constexpr (kWidth == 1) *row = values[0];
      else store_values(values, row);
    };
    store(args.fast, args.t, t);
#pragma unroll 1  // once at most, but for a clip of few frames
    for (int s = run.first[at.t]; s < run.first[at.t + 1]; ++s) store(args.slow, args.t_slow, s);
  }
}

// Values that a thread can take at a time: as many as make 16 bytes of a result, which starts at a multiple of that as
// PyTorch allocates it. They are as many bytes of the frames.
template <class T>
constexpr int kPathwayWidth = sizeof(T) == 8 ? 1 : Pack<T>::kSize;

template <class T>
bool in_packs(const PackPathways& args) {
  const auto frames = reinterpret_cast<uintptr_t>(args.frames);
  return ((3 * args.w) | frames | args.stride_n | args.stride_t | args.stride_h) % kPathwayWidth<T> == 0;
}

template <class T, class Queue>
void pack_pathways_as(Queue& queue, PackPathways args) {
  constexpr int kWidth = kPathwayWidth<T>;
  if (args.stride_h == 3 * args.w) {  // frames without gaps are one long row each
    args.w *= args.h;
    args.h = 1;
  }
  const bool packs = in_packs<T>(args);
  for (int64_t begin = 0; begin < args.t; begin += kPathwayFrames) {
    FrameRun<Accumulator<T>> run{args, {}, {}, begin, std::min<int64_t>(args.t - begin, kPathwayFrames), {}};
    run.args.first = nullptr;
    std::copy(args.scale, args.scale + 3, run.scale);
    std::copy(args.shift, args.shift + 3, run.shift);
    for (int64_t t = 0; t <= run.count; ++t) run.first[t] = int(args.first[begin + t]);
    const int64_t elements = args.n * run.count * args.h * 3 * args.w;
    if (packs) queue.launch(pack_pathways_kernel<T, kWidth>, element_launch(elements / kWidth), run);
    else queue.launch(pack_pathways_kernel<T, 1>, element_launch(elements), run);
  }
}

}  // namespace slowfast_fast::cuda
