// density_mask on a GPU. Two ways through the same pieces:
//
//   in one block: a plane of the sample and the selection's histograms fit into a block's shared memory (224 x 224
//     float32 on Hopper): one block a sample, R is read once and M written once;
//   in many blocks: planes lie in global memory, and each step is a launch of its own.
//
// Steps (csrc/cpu/density_mask.cpp has the formulas): g = |mean_c R|, its three quantiles, h, box average d (down, then
// along the rows), its quantile, M. The backward goes the same way back.
#pragma once

#include <type_traits>

#include "../box_average.h"
#include "selection.cuh"

namespace sib_ext::cuda {

struct MaskProblem {
  int64_t batch;
  int channels, height, width;
  Layout layout;
  int64_t radius;
  bool count_padding;
  double slope, eps;
  SoftQuantile quantiles[3];  // of the rows kRowLow, kRowHigh, kRowLevel; kRowAverage has the level's

  SIB_HOST_DEVICE uint32_t pixels() const { return static_cast<uint32_t>(height) * static_cast<uint32_t>(width); }
  SIB_HOST_DEVICE int64_t support() const { return quantiles[0].size; }
  // The most keys that are sorted to find a support.
  SIB_HOST_DEVICE int64_t list() const { return list_length(support() > kFewKeys ? support() : kFewKeys); }
};

// ------------------------------------------------------------------------------------- pixel by pixel

template <class S>
__device__ Accumulate<S> channel_mean(const S* sample, const MaskProblem& o, uint32_t pixel) {
  const S* at = sample + pixel * o.layout.pixel;
  Accumulate<S> total = widen(at[0]);
  for (int c = 1; c < o.channels; ++c) total += widen(at[c * o.layout.channel]);
  return total / static_cast<Accumulate<S>>(o.channels);
}

// f(pixel, mean_c R) for the pixels first, first + step, ...; loads of several pixels are under way at once.
template <int AtOnce, class S, class F>
__device__ void each_mean(const S* sample, const MaskProblem& o, uint32_t first, uint32_t last, uint32_t step, F f) {
  using T = Accumulate<S>;
  const int64_t stride = step * o.layout.pixel;  // added again and again: products would take more work than the sums
  for (uint32_t start = first; start < last; start += AtOnce * step) {
    T total[AtOnce] = {};
    for (int c = 0; c < o.channels; ++c) {
      const S* at = sample + c * o.layout.channel + start * o.layout.pixel;
      T values[AtOnce];
#pragma unroll
      for (int i = 0; i < AtOnce; ++i, at += stride) values[i] = start + i * step < last ? widen(*at) : T(0);
#pragma unroll
      for (int i = 0; i < AtOnce; ++i) total[i] += values[i];
    }
#pragma unroll
    for (int i = 0; i < AtOnce; ++i)
      if (start + i * step < last) f(start + i * step, total[i] / static_cast<T>(o.channels));
  }
}

template <class T>
__device__ bool not_finite(T v) {
  return ordered(v) >= Bits<T>::kInfinity;
}

template <class T>
__device__ T not_a_number() {
  return static_cast<T>(NAN);
}

// 1 / divisor of the average at a pixel: computed once where it is the same everywhere.
template <class T>
class InverseArea {
 public:
  __device__ explicit InverseArea(const MaskProblem& o) : o_(o), everywhere_(at(0, 0)) {}

  __device__ T operator()(int y, int x) const { return o_.count_padding ? everywhere_ : at(y, x); }
  __device__ T operator()(uint32_t p) const { return o_.count_padding ? everywhere_ : at(p / o_.width, p % o_.width); }

 private:
  __device__ T at(int y, int x) const {
    return T(1) / static_cast<T>(box_span(y, o_.height, o_.radius, o_.count_padding) *
                                 box_span(x, o_.width, o_.radius, o_.count_padding));
  }

  const MaskProblem& o_;
  T everywhere_;
};

// The quantiles of g as h needs them.
template <class T>
struct Steps {
  T level, scale;  // u = (g - level) * scale, h = sigmoid(slope u)

  __device__ Steps(const T* quantiles, const MaskProblem& o)
      : level(quantiles[kRowLevel]), scale(T(1) / (quantiles[kRowHigh] - quantiles[kRowLow] + static_cast<T>(o.eps))) {}
};

// float32 divides in an instruction, to 2 units in the last place and without a branch; the divisor may be infinite.
__device__ inline float fast_sigmoid(float v) {
#ifdef SIB_CUDA_EMULATION
  return sigmoid(v);
#else
  return __fdividef(1.0f, 1.0f + exponential(-v));
#endif
}
__device__ inline double fast_sigmoid(double v) { return sigmoid(v); }

// dL/d(d - q80(d)) from dL/dM.
template <class T>
__device__ T through_mask(T grad, T m, const MaskProblem& o) {
  return grad * static_cast<T>(o.slope) * m * (T(1) - m);
}

// dg/dR_c, the same for every channel c: the sign of mean_c R, shared by them; NaN stays NaN.
template <class T>
__device__ T through_magnitude(T mean, const MaskProblem& o) {
  const T share = T(1) / static_cast<T>(o.channels);
  return mean > 0 ? share : mean < 0 ? -share : mean;
}

// out(i, sum over the 2*radius+1 values around i) for i in [begin, end) of a line, sliding in the type Sum.
template <class Sum, class T, class Out>
__device__ void slide(const T* line, int64_t stride, int length, int64_t radius, int begin, int end, Out out) {
  const int reach = radius < length ? static_cast<int>(radius) : length - 1;
  Sum sum = 0;
  for (int i = begin > reach ? begin - reach - 1 : 0; i < begin + reach && i < length; ++i) sum += line[i * stride];
  for (int i = begin; i < end; ++i) {
    if (i + reach < length) sum += line[(i + reach) * stride];
    if (i > reach) sum -= line[(i - reach - 1) * stride];
    out(i, sum);
  }
}

// Sums down the columns of a plane, for one stretch of one column; neighbouring items are neighbouring columns. They
// slide in double: adding and later subtracting the same floats leaves no drift.
template <class T>
__device__ void box_down(const T* plane, const MaskProblem& o, int64_t item, int rows, T* out) {
  const int x = static_cast<int>(item % o.width), begin = static_cast<int>(item / o.width) * rows;
  const int end = begin + rows < o.height ? begin + rows : o.height;
  slide<double>(plane + x, o.width, o.height, o.radius, begin, end,
                [&](int y, double sum) { out[static_cast<int64_t>(y) * o.width + x] = static_cast<T>(sum); });
}

// write(scaled), where scaled(y, x, sum) is what becomes of a box sum; average: divided by the window's area, and not
// below zero. The cases are told apart out here, not within the loops that write.
template <class T, class Write>
__device__ void with_scale(const MaskProblem& o, bool average, Write write) {
  const InverseArea<T> inverse_area(o);
  const T everywhere = inverse_area(0, 0);
  if (!average) {
    write([](int, int, T sum) { return sum; });
  } else if (o.count_padding) {
    write([=](int, int, T sum) { return (sum < 0 ? T(0) : sum) * everywhere; });
  } else {
    write([&](int y, int x, T sum) { return (sum < 0 ? T(0) : sum) * inverse_area(y, x); });
  }
}

// Sums along rows for a run of pixels. They slide in T: runs are short, so there is little to drift, and conversions to
// double would cost more than the sums.
template <class T>
__device__ void box_along(const T* plane, const MaskProblem& o, int64_t first, int64_t last, bool average, T* out) {
  with_scale<T>(o, average, [&](auto scaled) {
    for (int64_t p = first; p < last;) {
      const int y = static_cast<int>(p / o.width), begin = static_cast<int>(p % o.width);
      const int end = o.width - begin < last - p ? o.width : begin + static_cast<int>(last - p);
      const int64_t row = p - begin;
      slide<T>(plane + row, 1, o.width, o.radius, begin, end, [&](int x, T sum) { out[row + x] = scaled(y, x, sum); });
      p += end - begin;
    }
  });
}

// ------------------------------------------------------------------------------ one block works on a sample

// Threads of a block at most: as many as have the registers that the kernels want.
constexpr int max_block(size_t element) { return element == sizeof(double) ? 512 : 768; }
constexpr int kMaxWarps = max_block(sizeof(float)) / kWarp;

constexpr int kBlockWords = Selection<float, 3>::kWords;
constexpr int64_t kIndexable = 1 << 16;  // pixels that a candidate's 16 bits can name: more than fit today's blocks

// What a block has in shared memory after its plane.
template <class T>
struct alignas(16) BlockScratch {
  uint32_t words[kBlockWords];  // histograms from below, candidates from above; lists of pixels; staging room
  Selection<T, 3> selection;
  double sums[kMaxWarps];
  T quantiles[kRows];
};

constexpr int64_t kStagingBytes = kBlockWords * sizeof(uint32_t);
constexpr int64_t kShortList = 2048;  // lists up to this length stay in shared memory
static_assert(3 * kShortList <= kBlockWords, "lists overlay the histograms");

inline int64_t plane_bytes(int64_t pixels, int64_t element) { return ceil_div(pixels * element, 16) * 16; }

template <class T>
bool fits_in_block(const MaskProblem& o, const Device& device) {
  const int64_t bytes = plane_bytes(o.pixels(), sizeof(T)) + static_cast<int64_t>(sizeof(BlockScratch<T>));
  return bytes <= device.shared_bytes && o.pixels() <= kIndexable &&
         o.width * static_cast<int64_t>(sizeof(T)) <= kStagingBytes;
}

// Threads of a block for one sample: many for a large plane, few for a small one, so that blocks share a processor.
template <class T>
int block_threads(uint32_t pixels) {
  return pixels >= 16384 ? max_block(sizeof(T)) : pixels >= 2048 ? 256 : 64;
}

// The run of neighbouring pixels that this thread owns: of odd length, so that a warp meets all banks.
struct Run {
  uint32_t first, last;

  __device__ uint32_t size() const { return last - first; }
  __device__ uint32_t operator()(uint32_t k) const { return first + k; }

  __device__ explicit Run(uint32_t pixels) {
    const uint32_t length = (pixels + blockDim.x - 1) / blockDim.x | 1;
    const uint64_t begin = static_cast<uint64_t>(length) * threadIdx.x;
    first = begin < pixels ? static_cast<uint32_t>(begin) : pixels;
    last = pixels - first < length ? pixels : first + length;
  }
};

template <class T>
struct BlockMemory {
  T* plane;
  BlockScratch<T>& scratch;

  __device__ explicit BlockMemory(const MaskProblem& o)
      : plane(reinterpret_cast<T*>(block_memory())),
        scratch(*reinterpret_cast<BlockScratch<T>*>(
            block_memory() + (static_cast<int64_t>(o.pixels()) * sizeof(T) + 15) / 16 * 16)) {}
};

// Sums along the rows of down: a warp takes a row, and a window's sum is the difference of two of the row's running
// sums. Each lane adds up a stretch, of odd length so that the warp meets all banks. Windows that slide would have to be
// summed anew for the few pixels that a thread has.
template <class T, class Scaled>
__device__ void rows_in_block(const T* down, const MaskProblem& o, T* staging, T* plane, Scaled scaled) {
  const int room = static_cast<int>(kStagingBytes / sizeof(T)) / o.width, most = blockDim.x / kWarp;
  const int warps = room < most ? room : most, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (warp >= warps) return;
  const int reach = o.radius < o.width ? static_cast<int>(o.radius) : o.width - 1;
  const int stretch = (o.width + kWarp - 1) / kWarp | 1, begin = lane * stretch < o.width ? lane * stretch : o.width;
  const int end = begin + stretch < o.width ? begin + stretch : o.width;
  T* const sums = staging + warp * o.width;
  for (int y = warp; y < o.height; y += warps) {
    const T* const from = down + y * o.width;
    T* const to = plane + y * o.width;
    const auto staged = [&](int x) { return sums[x]; };
    __syncwarp();  // the row before has been used
    each_loaded<8>(
        lane, o.width, kWarp, [&](int x) { return from[x]; }, [&](int x, T down_here) { sums[x] = down_here; });
    __syncwarp();
    T up_to_here = 0;
    each_loaded<8>(begin, end, 1, staged, [&](int, T value) { up_to_here += value; });
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const T before = __shfl_up_sync(kAllLanes, up_to_here, offset);
      if (lane >= offset) up_to_here += before;
    }
    T sum = __shfl_up_sync(kAllLanes, up_to_here, 1);
    if (lane == 0) sum = 0;
    each_loaded<8>(begin, end, 1, staged, [&](int x, T value) { sums[x] = sum += value; });
    __syncwarp();
    each_loaded<8>(
        lane, o.width, kWarp,
        [&](int x) {
          const T last = sums[x + reach < o.width ? x + reach : o.width - 1];
          return x > reach ? last - sums[x - reach - 1] : last;
        },
        [&](int x, T window) { to[x] = scaled(y, x, window); });
  }
}

// The box sums of a block's plane, in place, once a barrier has completed it; down is a plane in global memory for the
// sums in between.
template <class T>
__device__ void box_in_block(T* plane, T* down, const MaskProblem& o, bool average, T* staging) {
  const int threads = blockDim.x, segments = threads > o.width ? threads / o.width : 1;
  const int rows = (o.height + segments - 1) / segments;
  for (int64_t item = threadIdx.x; item < static_cast<int64_t>(segments) * o.width; item += blockDim.x)
    box_down(plane, o, item, rows, down);
  __syncthreads();
  with_scale<T>(o, average, [&](auto scaled) { rows_in_block(down, o, staging, plane, scaled); });
  __syncthreads();
}

// The supports of Q quantiles of the block's plane, and the quantiles; long_lists may be null if lists are short. Words
// (kBlockWords of them) hold the counts of the first digit.
template <class T, int Q>
__device__ void quantiles_in_block(const T* plane, const MaskProblem& o, const SoftQuantile* quantiles,
                                   Selection<T, Q>& s, uint32_t* words, uint32_t* long_lists, int64_t* support,
                                   T* result) {
  const uint32_t pixels = o.pixels();
  const int64_t size = o.support();
  const Run run(pixels);
  uint16_t* const top = reinterpret_cast<uint16_t*>(words + kBlockWords);
  const auto candidate = [&](const Run& of_list) {
    return [=](uint32_t k) -> uint32_t { return top[-1 - static_cast<int>(of_list(k))]; };
  };
  uint32_t candidates = 0;  // that lie below top, once they fit there: from then on only they are looked at
  start_selection(s, quantiles, pixels);
  for (int i = 0;;) {
    __syncthreads();
    descend_all(s, key_digit<T>(pixels, i), words);
    __syncthreads();
    if (most_between(s, size) <= o.list()) break;
    const Digit digit = key_digit<T>(pixels, ++i);
    share_histograms(s, digit);
    __syncthreads();
    const uint32_t room = 2 * (kBlockWords - s.words());
    if (candidates > room) candidates = 0;
    uint32_t expected = 0;
    for (int q = 0; q < Q; ++q) expected += between(s, q, size);
    if (candidates == 0 && expected <= room) {
      if (threadIdx.x == 0) s.candidates = 0;
      __syncthreads();
      gather_candidates(plane, run.first, run.last, s, top);
      __syncthreads();
      candidates = s.candidates;
    }
    clear(words, s.words());
    __syncthreads();
    if (candidates) {
      const Run of_list(candidates);
      count_next(plane, of_list.size(), candidate(of_list), s, digit, words);
    } else {
      count_next(plane, run.size(), run, s, digit, words);
    }
  }
  const int64_t length = list_length(most_between(s, size));
  uint32_t* lists = long_lists ? long_lists : words;
  if (!long_lists && candidates > 2 * (kBlockWords - Q * length)) candidates = 0;
  pad_lists(s, lists, length, size);
  if (candidates) {
    const Run of_list(candidates);
    collect(plane, of_list.size(), candidate(of_list), s, s.filled, lists, length);
  } else {
    collect(plane, run.size(), run, s, s.filled, lists, length);
  }
  sort_lists(plane, lists, Q, length);
  for (int q = 0; q < Q; ++q)
    for (int64_t k = threadIdx.x; k < size; k += blockDim.x)
      support[q * size + k] = lists[q * length + s.ends[2 * q].rank + k];
  for (int q = threadIdx.x / kWarp; q < Q; q += blockDim.x / kWarp) {
    const uint32_t* list = lists + q * length + s.ends[2 * q].rank;
    const T value = take_quantile<T>(quantiles[q], [&](int64_t k) { return plane[list[k]]; });
    if (threadIdx.x % kWarp == 0) result[q] = value;
  }
  __syncthreads();
}

template <class S>
__global__ void __launch_bounds__(max_block(sizeof(S)), 1)
    mask_in_block_kernel(const S* R, MaskProblem o, uint32_t* long_lists, Accumulate<S>* mask, int64_t* support) {
  using T = Accumulate<S>;
  const int64_t sample = blockIdx.x, size = o.support();
  const uint32_t pixels = o.pixels();
  const BlockMemory<T> memory(o);
  T* plane = memory.plane;
  BlockScratch<T>& scratch = memory.scratch;
  R += sample * o.layout.batch;
  mask += sample * pixels;
  support += sample * kRows * size;
  if (long_lists) long_lists += sample * 3 * o.list();

  int spoilt = 0;
  clear(scratch.words, 2 * kHistogram);
  __syncthreads();
  each_mean<8>(R, o, threadIdx.x, pixels, blockDim.x, [&](uint32_t p, T mean) {
    plane[p] = mean < 0 ? -mean : mean;
    spoilt |= not_finite(mean);
    atomicAdd(&scratch.words[bin_word(first_bin(mean))], 1u);
  });
  if (__syncthreads_or(spoilt)) {
    for (uint32_t p = threadIdx.x; p < pixels; p += blockDim.x) mask[p] = not_a_number<T>();
    for (int64_t k = threadIdx.x; k < kRows * size; k += blockDim.x) support[k] = 0;
    return;
  }

  quantiles_in_block(plane, o, o.quantiles, scratch.selection, scratch.words, long_lists, support,
                     scratch.quantiles);
  const Steps<T> steps(scratch.quantiles, o);
  const T slope = static_cast<T>(o.slope);
  each_loaded<4>(
      threadIdx.x, pixels, blockDim.x, [&](int p) { return plane[p]; },
      [&](int p, T g) { plane[p] = fast_sigmoid(slope * ((g - steps.level) * steps.scale)); });
  __syncthreads();

  // M's own memory holds the sums in between.
  box_in_block(plane, mask, o, true, reinterpret_cast<T*>(scratch.words));

  clear(scratch.words, 2 * kHistogram);
  __syncthreads();
  const Run run(pixels);
  count_first(plane, run.size(), run, scratch.words);  // neighbours in one thread: d is smooth
  auto& selection = *reinterpret_cast<Selection<T, 1>*>(&scratch.selection);
  quantiles_in_block(plane, o, o.quantiles + kRowLevel, selection, scratch.words, long_lists,
                     support + kRowAverage * size, scratch.quantiles + kRowAverage);
  const T level = scratch.quantiles[kRowAverage];
  each_loaded<4>(
      threadIdx.x, pixels, blockDim.x, [&](int p) { return plane[p]; },
      [&](int p, T d) { mask[p] = fast_sigmoid(slope * (d - level)); });
}

// plane[p] -= total * weight * factor(p) for the pixels p of a support, by the whole block.
template <class T, class Factor>
__device__ void subtract_at(T* plane, const int64_t* pixels, const SoftQuantile& q, double total, Factor factor) {
  for (int64_t k = threadIdx.x; k < q.size; k += blockDim.x)
    plane[pixels[k]] -= static_cast<T>(total * q.weight(k)) * factor(static_cast<uint32_t>(pixels[k]));
}

// The three quantiles of g from their supports, by the block's last warps, which have the least to do in box_down.
template <class S>
__device__ void quantiles_from_support(const S* R, const MaskProblem& o, const int64_t* support, Accumulate<S>* result) {
  using T = Accumulate<S>;
  for (int row = (blockDim.x - 1 - threadIdx.x) / kWarp; row < 3; row += blockDim.x / kWarp) {
    const T value = take_quantile<T>(o.quantiles[row], [&](int64_t k) {
      const T g = channel_mean(R, o, static_cast<uint32_t>(support[row * o.support() + k]));
      return g < 0 ? -g : g;
    });
    if (threadIdx.x % kWarp == 0) result[row] = value;
  }
}

// From dL/dh at a pixel to its share of dL/dR, before the quantiles' shares; adds to the two sums that these need.
template <class T>
__device__ T through_steps(T grad, T mean, const Steps<T>& steps, const MaskProblem& o, double& sum, double& slip) {
  const T slope = static_cast<T>(o.slope), u = ((mean < 0 ? -mean : mean) - steps.level) * steps.scale;
  const T h = fast_sigmoid(slope * u), through = grad * slope * h * (T(1) - h);
  slip += static_cast<double>(through * u) * steps.scale;
  sum += through * steps.scale;
  return through * steps.scale * through_magnitude(mean, o);
}

// Takes the quantiles' shares off the pixels they rest on, by the whole block.
template <class S>
__device__ void subtract_shares(Accumulate<S>* plane, const S* R, const MaskProblem& o, const int64_t* support,
                                double sum, double slip) {
  const int64_t size = o.support();
  for (int64_t first = 0; first < 3 * size; first += blockDim.x) {
    const int64_t item = first + threadIdx.x;
    const int row = item < 3 * size ? static_cast<int>(item / size) : 3;
    uint32_t pixel = 0;
    Accumulate<S> share = 0;
    if (row < 3) {
      const double total = row == kRowLevel ? sum : row == kRowHigh ? slip : -slip;
      pixel = static_cast<uint32_t>(support[item]);
      share = static_cast<Accumulate<S>>(total * o.quantiles[row].weight(item % size)) *
              through_magnitude(channel_mean(R, o, pixel), o);
    }
    for (int turn = 0; turn < 3; ++turn) {  // rows one after another, as supports may share pixels
      if (row == turn) plane[pixel] -= share;
      __syncthreads();
    }
  }
}

template <class S>
__global__ void __launch_bounds__(max_block(sizeof(S)), 1)
    mask_backward_in_block_kernel(const Accumulate<S>* grad_mask, const S* R, const Accumulate<S>* mask,
                                  const int64_t* support, MaskProblem o, Accumulate<S>* down, S* grad) {
  using T = Accumulate<S>;
  const int64_t sample = blockIdx.x, size = o.support();
  const uint32_t pixels = o.pixels();
  const BlockMemory<T> memory(o);
  T* plane = memory.plane;
  BlockScratch<T>& scratch = memory.scratch;
  grad_mask += sample * pixels;
  R += sample * o.layout.batch;
  mask += sample * pixels;
  support += sample * kRows * size;
  down += sample * pixels;
  grad += sample * pixels;

  struct Loaded {
    T grad, m;
  };
  // The box is its own transpose: what it will sum up is divided by the window's area beforehand.
  const auto through_average = [&](auto inverse_area) {
    double total = 0;
    each_loaded<8>(
        threadIdx.x, pixels, blockDim.x, [&](int p) { return Loaded{grad_mask[p], mask[p]}; },
        [&](int p, Loaded loaded) {
          const T grad_average = through_mask(loaded.grad, loaded.m, o);
          plane[p] = grad_average * inverse_area(p);
          total += grad_average;
        });
    total = block_sum(total, scratch.sums);
    subtract_at(plane, support + kRowAverage * size, o.quantiles[kRowLevel], total, inverse_area);
  };
  const InverseArea<T> inverse_area(o);
  if (o.count_padding) {
    const T everywhere = inverse_area(0);
    through_average([=](uint32_t) { return everywhere; });
  } else {
    through_average(inverse_area);
  }
  __syncthreads();
  quantiles_from_support(R, o, support, scratch.quantiles);
  box_in_block(plane, down, o, false, reinterpret_cast<T*>(scratch.words));

  const Steps<T> steps(scratch.quantiles, o);
  double sum = 0, slip = 0;
  each_mean<8>(R, o, threadIdx.x, pixels, blockDim.x,
               [&](uint32_t p, T mean) { plane[p] = through_steps(plane[p], mean, steps, o, sum, slip); });
  sum = block_sum(sum, scratch.sums);
  slip = block_sum(slip, scratch.sums);
  subtract_shares(plane, R, o, support, sum, slip);
  each_loaded<8>(
      threadIdx.x, pixels, blockDim.x, [&](int p) { return plane[p]; },
      [&](int p, T value) { grad[p] = narrow<S>(value); });
}

// ----------------------------------------------------------------------------- many blocks work on a sample

constexpr int kThreads = 256;
constexpr int kRunPixels = 64;                      // that a thread counts, or along which it slides down
constexpr int kTilePixels = kThreads * kRunPixels;  // that a block counts
constexpr int kSpreadPixels = 4 * kThreads;         // that a block works on one by one

// Sample and number of this block, where each sample has so many.
struct Part {
  int64_t sample;
  uint32_t index;

  __device__ explicit Part(uint32_t parts) : sample(blockIdx.x / parts), index(blockIdx.x % parts) {}
};

// f(pixel) for the pixels of this block's part, neighbouring threads at neighbouring pixels.
template <class F>
__device__ void each_pixel(const Part& part, uint32_t pixels, F f) {
#pragma unroll
  for (int i = 0; i < kSpreadPixels / kThreads; ++i) {
    const uint32_t p = part.index * kSpreadPixels + i * kThreads + threadIdx.x;
    if (p < pixels) f(p);
  }
}

// f(pixel, mean_c R) likewise.
template <class S, class F>
__device__ void each_mean(const Part& part, const S* R, const MaskProblem& o, F f) {
  const uint32_t begin = part.index * kSpreadPixels, end = begin + kSpreadPixels;  // fewer than 2^32: pixels are < 2^31
  each_mean<kSpreadPixels / kThreads>(R + part.sample * o.layout.batch, o, begin + threadIdx.x,
                                      end < o.pixels() ? end : o.pixels(), kThreads, f);
}

inline int64_t parts_of(const MaskProblem& o) { return ceil_div(o.pixels(), kSpreadPixels); }

template <class S>
__global__ void density_kernel(const S* R, MaskProblem o, uint32_t parts, Accumulate<S>* plane, int* spoilt) {
  const Part part(parts);
  each_mean(part, R, o, [&](uint32_t p, Accumulate<S> mean) {
    plane[part.sample * o.pixels() + p] = mean < 0 ? -mean : mean;
    if (not_finite(mean)) atomicOr(&spoilt[part.sample], 1);
  });
}

// The pixels that a thread counts: four neighbours, and again four so much further on; a warp's are side by side.
struct Strides {
  uint32_t first, count;

  __device__ Strides(const Part& part, uint32_t pixels) : first(part.index * kTilePixels + 4 * threadIdx.x), count(0) {
    if (first >= pixels) return;
    const uint32_t left = pixels - first, strides = (left - 1) / (4 * kThreads), rest = left - strides * 4 * kThreads;
    count = strides >= kRunPixels / 4 ? kRunPixels : 4 * strides + (rest < 4 ? rest : 4);
  }
  __device__ uint32_t size() const { return count; }
  __device__ uint32_t operator()(uint32_t k) const { return first + k / 4 * (4 * kThreads) + k % 4; }
};

template <class T, int Q>
__global__ void start_selection_kernel(MaskProblem o, int quantile, Selection<T, Q>* selections, uint32_t* histograms) {
  Selection<T, Q>& s = selections[blockIdx.x];
  start_selection(s, o.quantiles + quantile, o.pixels());
  clear(histograms + static_cast<int64_t>(blockIdx.x) * s.kWords, 2 * kHistogram);
}

// Counts digit i of a plane, if the selection needs it.
template <class T, int Q>
__global__ void count_kernel(const T* plane, MaskProblem o, int i, uint32_t parts, const Selection<T, Q>* selections,
                             uint32_t* histograms) {
  const Part part(parts);
  const Selection<T, Q>& s = selections[part.sample];
  if (most_between(s, o.support()) <= o.list()) return;
  uint32_t* own = reinterpret_cast<uint32_t*>(block_memory());
  clear(own, s.words());
  __syncthreads();
  plane += part.sample * o.pixels();
  const Strides strides(part, o.pixels());
  if (i == 0) {
    count_first(plane, strides.size(), strides, own);
  } else {
    count_next(plane, strides.size(), strides, s, key_digit<T>(o.pixels(), i), own);
  }
  __syncthreads();
  for (int word = threadIdx.x; word < s.words(); word += blockDim.x)
    if (own[word]) atomicAdd(&histograms[part.sample * s.kWords + word], own[word]);
}

template <class T, int Q>
__global__ void descend_kernel(MaskProblem o, int i, Selection<T, Q>* selections, uint32_t* histograms) {
  Selection<T, Q>& s = selections[blockIdx.x];
  histograms += static_cast<int64_t>(blockIdx.x) * s.kWords;
  if (most_between(s, o.support()) <= o.list()) return;
  __syncthreads();
  descend_all(s, key_digit<T>(o.pixels(), i), histograms);
  __syncthreads();
  if (most_between(s, o.support()) <= o.list()) return;
  share_histograms(s, key_digit<T>(o.pixels(), i + 1));
  __syncthreads();
  clear(histograms, s.words());
}

template <class T, int Q>
__global__ void collect_kernel(const T* plane, MaskProblem o, uint32_t parts, Selection<T, Q>* selections,
                               uint32_t* lists) {
  const Part part(parts);
  Selection<T, Q>& s = selections[part.sample];
  const int64_t length = list_length(most_between(s, o.support()));
  const Strides strides(part, o.pixels());
  collect(plane + part.sample * o.pixels(), strides.size(), strides, s, s.filled, lists + part.sample * Q * o.list(),
          length);
}

// Sorts the supports of a sample; a spoilt one gets zeros, as its mask is NaN.
template <class T, int Q>
__global__ void rank_kernel(const T* plane, MaskProblem o, int quantile, int row, const int* spoilt,
                            const Selection<T, Q>* selections, uint32_t* lists, int64_t* support, T* quantiles) {
  const int64_t sample = blockIdx.x, size = o.support();
  const Selection<T, Q>& s = selections[sample];
  const int64_t length = list_length(most_between(s, size));
  plane += sample * o.pixels();
  lists += sample * Q * o.list();
  support += (sample * kRows + row) * size;
  pad_lists(s, lists, length, size);
  sort_lists(plane, lists, Q, length);
  for (int q = 0; q < Q; ++q)
    for (int64_t k = threadIdx.x; k < size; k += blockDim.x)
      support[q * size + k] = spoilt[sample] ? 0 : lists[q * length + s.ends[2 * q].rank + k];
  for (int q = threadIdx.x / kWarp; q < Q; q += blockDim.x / kWarp) {
    const uint32_t* list = lists + q * length + s.ends[2 * q].rank;
    const T value = take_quantile<T>(o.quantiles[quantile + q], [&](int64_t k) { return plane[list[k]]; });
    if (threadIdx.x % kWarp == 0) quantiles[sample * Q + q] = value;
  }
}

template <class T>
__global__ void steps_kernel(MaskProblem o, uint32_t parts, const T* quantiles, T* plane) {
  const Part part(parts);
  const Steps<T> steps(quantiles + part.sample * 3, o);
  each_pixel(part, o.pixels(), [&](uint32_t p) {
    T& value = plane[part.sample * o.pixels() + p];
    value = fast_sigmoid(static_cast<T>(o.slope) * ((value - steps.level) * steps.scale));
  });
}

template <class T>
__global__ void box_down_kernel(const T* plane, MaskProblem o, uint32_t parts, int64_t items, T* out) {
  const Part part(parts);
  const int64_t item = static_cast<int64_t>(part.index) * blockDim.x + threadIdx.x, offset = part.sample * o.pixels();
  if (item < items) box_down(plane + offset, o, item, kRunPixels, out + offset);
}

// The tile of pixels that a block averages along rows: a run of odd length a thread, so that a warp meets all banks.
SIB_HOST_DEVICE constexpr int along_run(size_t element) { return element == sizeof(double) ? 9 : 17; }
SIB_HOST_DEVICE constexpr int along_tile(size_t element) { return kThreads * along_run(element); }
// Pixels beside a tile that fit with it into the shared memory that any block may have.
constexpr int64_t most_halo(size_t element) { return 24 * 1024 / static_cast<int>(element) - along_tile(element); }

// Loads and stores go through shared memory, so that neighbouring threads are at neighbouring pixels; halo is how far
// beyond the tile windows reach, 0 where that does not fit and the plane is read in place.
template <class T>
__global__ void box_along_kernel(const T* plane, MaskProblem o, bool average, uint32_t parts, int halo, T* out) {
  constexpr int kRun = along_run(sizeof(T)), kTile = along_tile(sizeof(T));
  const Part part(parts);
  const int64_t pixels = o.pixels(), begin = static_cast<int64_t>(part.index) * kTile;
  const int64_t end = begin + kTile < pixels ? begin + kTile : pixels, mine = begin + threadIdx.x * kRun;
  const int64_t first = mine < end ? mine : end, last = first + kRun < end ? first + kRun : end;
  T *results = reinterpret_cast<T*>(block_memory()), *staged = results + kTile;
  plane += part.sample * pixels;
  out += part.sample * pixels;
  if (halo) {
    const int64_t from = begin > halo ? begin - halo : 0, to = end + halo < pixels ? end + halo : pixels;
#pragma unroll 4
    for (int64_t p = from + threadIdx.x; p < to; p += kThreads) staged[p - from] = plane[p];
    __syncthreads();
    box_along(staged - from, o, first, last, average, results - begin);
  } else {
    box_along(plane, o, first, last, average, results - begin);
  }
  __syncthreads();
  for (int64_t p = begin + threadIdx.x; p < end; p += kThreads) out[p] = results[p - begin];
}

template <class T>
__global__ void finish_mask_kernel(const T* plane, MaskProblem o, uint32_t parts, const T* level, const int* spoilt,
                                   T* mask) {
  const Part part(parts);
  each_pixel(part, o.pixels(), [&](uint32_t p) {
    const int64_t at = part.sample * o.pixels() + p;
    const T m = fast_sigmoid(static_cast<T>(o.slope) * (plane[at] - level[part.sample]));
    mask[at] = spoilt[part.sample] ? not_a_number<T>() : m;
  });
}

template <class T>
__global__ void through_mask_kernel(const T* grad_mask, const T* mask, MaskProblem o, uint32_t parts, T* plane,
                                    double* partials) {
  const Part part(parts);
  double total = 0;
  each_pixel(part, o.pixels(), [&](uint32_t p) {
    const int64_t at = part.sample * o.pixels() + p;
    plane[at] = through_mask(grad_mask[at], mask[at], o);
    total += plane[at];
  });
  total = block_sum(total, reinterpret_cast<double*>(block_memory()));
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// The sum of a sample's partial sums, by the whole block.
__device__ inline double sum_partials(const double* partials, uint32_t count) {
  double total = 0;
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) total += partials[i];
  return block_sum(total, reinterpret_cast<double*>(block_memory()));
}

template <class T>
__global__ void average_share_kernel(const double* partials, uint32_t parts, MaskProblem o, const int64_t* support,
                                     T* plane) {
  const int64_t sample = blockIdx.x, size = o.support();
  const double total = sum_partials(partials + sample * parts, parts);
  subtract_at(plane + sample * o.pixels(), support + (sample * kRows + kRowAverage) * size, o.quantiles[kRowLevel],
              total, [](uint32_t) { return T(1); });
}

template <class T>
__global__ void divide_kernel(MaskProblem o, uint32_t parts, T* plane) {
  const Part part(parts);
  const InverseArea<T> inverse_area(o);
  each_pixel(part, o.pixels(),
             [&](uint32_t p) { plane[part.sample * o.pixels() + p] *= inverse_area(p); });
}

template <class S>
__global__ void support_quantiles_kernel(const S* R, MaskProblem o, const int64_t* support, Accumulate<S>* quantiles) {
  const int64_t sample = blockIdx.x;
  quantiles_from_support(R + sample * o.layout.batch, o, support + sample * kRows * o.support(), quantiles + sample * 3);
}

template <class S>
__global__ void through_steps_kernel(const S* R, MaskProblem o, uint32_t parts, const Accumulate<S>* quantiles,
                                     Accumulate<S>* plane, double* sums, double* slips) {
  using T = Accumulate<S>;
  const Part part(parts);
  const Steps<T> steps(quantiles + part.sample * 3, o);
  double sum = 0, slip = 0;
  each_mean(part, R, o, [&](uint32_t p, T mean) {
    T& value = plane[part.sample * o.pixels() + p];
    value = through_steps(value, mean, steps, o, sum, slip);
  });
  double* scratch = reinterpret_cast<double*>(block_memory());
  sum = block_sum(sum, scratch);
  slip = block_sum(slip, scratch);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    slips[blockIdx.x] = slip;
  }
}

template <class S>
__global__ void subtract_shares_kernel(const double* sums, const double* slips, uint32_t parts, const S* R,
                                       MaskProblem o, const int64_t* support, Accumulate<S>* plane) {
  const int64_t sample = blockIdx.x;
  const double sum = sum_partials(sums + sample * parts, parts), slip = sum_partials(slips + sample * parts, parts);
  subtract_shares(plane + sample * o.pixels(), R + sample * o.layout.batch, o, support + sample * kRows * o.support(),
                  sum, slip);
}

template <class S>
__global__ void narrow_kernel(const Accumulate<S>* plane, MaskProblem o, uint32_t parts, S* grad) {
  const Part part(parts);
  each_pixel(part, o.pixels(), [&](uint32_t p) {
    const int64_t at = part.sample * o.pixels() + p;
    grad[at] = narrow<S>(plane[at]);
  });
}

// ----------------------------------------------------------------------------------------- the launches

constexpr int64_t kSumBytes = kThreads / kWarp * sizeof(double);

// Q quantiles of planes in global memory, from the given one on; their supports go to rows from the given one on.
template <class T, int Q>
T* launch_quantiles(const T* plane, const MaskProblem& o, int quantile, int row, const Device& device, const int* spoilt,
                    int64_t* support) {
  constexpr int kWords = Selection<T, Q>::kWords;
  const int64_t parts = ceil_div(o.pixels(), kTilePixels);
  auto* selections = device.array<Selection<T, Q>>(o.batch);
  uint32_t* histograms = device.array<uint32_t>(o.batch * kWords);
  uint32_t* lists = device.array<uint32_t>(o.batch * Q * o.list());
  T* quantiles = device.array<T>(o.batch * Q);
  launch(device, start_selection_kernel<T, Q>, o.batch, kThreads, 0, o, quantile, selections, histograms);
  for (int i = 0; i < value_digits<T>() + pixel_digits(o.pixels()); ++i) {
    launch(device, count_kernel<T, Q>, o.batch * parts, kThreads, kWords * sizeof(uint32_t), plane, o, i, parts,
           selections, histograms);
    launch(device, descend_kernel<T, Q>, o.batch, kThreads, 0, o, i, selections, histograms);
  }
  launch(device, collect_kernel<T, Q>, o.batch * parts, kThreads, 0, plane, o, parts, selections, lists);
  launch(device, rank_kernel<T, Q>, o.batch, kThreads, 0, plane, o, quantile, row, spoilt, selections, lists, support,
         quantiles);
  return quantiles;
}

// Box sums from a plane back into it.
template <class T>
void launch_box(T* plane, T* between, const MaskProblem& o, bool average, const Device& device) {
  const int64_t items = static_cast<int64_t>(o.width) * ceil_div(o.height, kRunPixels);
  const int64_t down = ceil_div(items, kThreads), tile = along_tile(sizeof(T)), along = ceil_div(o.pixels(), tile);
  const int64_t reach = (o.radius < o.width ? o.radius : o.width - 1) + 1;  // and the value that leaves the sum
  const int64_t halo = reach <= most_halo(sizeof(T)) ? reach : 0;
  const int64_t bytes = (tile + (halo ? tile + 2 * halo : 0)) * sizeof(T);
  launch(device, box_down_kernel<T>, o.batch * down, kThreads, 0, plane, o, down, items, between);
  launch(device, box_along_kernel<T>, o.batch * along, kThreads, bytes, between, o, average, along, halo, plane);
}

template <class S>
void mask_forward(const S* R, const MaskProblem& o, const Device& device, Accumulate<S>* mask, int64_t* support) {
  using T = Accumulate<S>;
  if (o.batch == 0) return;
  if (fits_in_block<T>(o, device)) {
    uint32_t* lists = o.list() > kShortList ? device.array<uint32_t>(o.batch * 3 * o.list()) : nullptr;
    const int64_t bytes = plane_bytes(o.pixels(), sizeof(T)) + sizeof(BlockScratch<T>);
    launch(device, mask_in_block_kernel<S>, o.batch, block_threads<T>(o.pixels()), bytes, R, o, lists, mask, support);
    return;
  }
  const int64_t parts = parts_of(o), blocks = o.batch * parts;
  T* plane = device.array<T>(o.batch * o.pixels());
  int* spoilt = device.array<int>(o.batch);
  check(cudaMemsetAsync(spoilt, 0, o.batch * sizeof(int), device.stream), "sib_ext: clearing memory");
  launch(device, density_kernel<S>, blocks, kThreads, 0, R, o, parts, plane, spoilt);
  const T* quantiles = launch_quantiles<T, 3>(plane, o, kRowLow, kRowLow, device, spoilt, support);
  launch(device, steps_kernel<T>, blocks, kThreads, 0, o, parts, quantiles, plane);
  launch_box(plane, mask, o, true, device);  // M's own memory holds the sums in between
  const T* level = launch_quantiles<T, 1>(plane, o, kRowLevel, kRowAverage, device, spoilt, support);
  launch(device, finish_mask_kernel<T>, blocks, kThreads, 0, plane, o, parts, level, spoilt, mask);
}

template <class S>
void mask_backward(const Accumulate<S>* grad_mask, const S* R, const Accumulate<S>* mask, const int64_t* support,
                   const MaskProblem& o, const Device& device, S* grad) {
  using T = Accumulate<S>;
  if (o.batch == 0) return;
  T* between = device.array<T>(o.batch * o.pixels());
  if (fits_in_block<T>(o, device)) {
    const int64_t bytes = plane_bytes(o.pixels(), sizeof(T)) + sizeof(BlockScratch<T>);
    launch(device, mask_backward_in_block_kernel<S>, o.batch, block_threads<T>(o.pixels()), bytes, grad_mask, R, mask,
           support, o, between, grad);
    return;
  }
  const int64_t parts = parts_of(o), blocks = o.batch * parts;
  constexpr bool in_place = std::is_same_v<S, T>;  // there is nothing to narrow
  T* plane;
  if constexpr (in_place) {
    plane = grad;
  } else {
    plane = device.array<T>(o.batch * o.pixels());
  }
  T* quantiles = device.array<T>(o.batch * 3);
  double *sums = device.array<double>(blocks), *slips = device.array<double>(blocks);
  launch(device, through_mask_kernel<T>, blocks, kThreads, kSumBytes, grad_mask, mask, o, parts, plane, sums);
  launch(device, average_share_kernel<T>, o.batch, kThreads, kSumBytes, sums, parts, o, support, plane);
  launch(device, divide_kernel<T>, blocks, kThreads, 0, o, parts, plane);
  launch_box(plane, between, o, false, device);
  launch(device, support_quantiles_kernel<S>, o.batch, kThreads, 0, R, o, support, quantiles);
  launch(device, through_steps_kernel<S>, blocks, kThreads, kSumBytes, R, o, parts, quantiles, plane, sums, slips);
  launch(device, subtract_shares_kernel<S>, o.batch, kThreads, kSumBytes, sums, slips, parts, R, o, support, plane);
  if constexpr (!in_place) launch(device, narrow_kernel<S>, blocks, kThreads, 0, plane, o, parts, grad);
}

}  // namespace sib_ext::cuda
