// masked_statistics on a GPU: a = R*M, b = x*M and c = R*(1-M) exist in registers and shared memory only.
//
// Moments: each block sums a part of a sample, a second launch adds the parts. Grams: the elements of a sample are cut
// into splits; a block forms one tile of the product over one split, a second launch adds the splits. Backward: a block
// holds a tile of samples x pixels, goes through its channels, multiplies by G + G^T, and keeps dL/dM in registers.
// All cuts depend on the sizes (and the number of multiprocessors) alone, and all sums run in a fixed order.
#pragma once

#include "../moments.h"
#include "common.cuh"
#include "tensor_product.cuh"

namespace sib_ext::cuda {

constexpr int kBlock = 256;
constexpr int kMicro = 4;  // a thread forms 4 x 4 values of a product

template <class S>
struct Fields {
  using T = Accumulate<S>;
  const S *R, *x;
  const T* M;
  Layout layout_R, layout_x;
  int64_t batch, pixels;
  int channels;
  bool vector;  // four pixels can be loaded and stored at once
};

template <class T>
__device__ Four<T> none() {
  Four<T> zeros;
#pragma unroll
  for (int i = 0; i < kVector; ++i) zeros.v[i] = 0;
  return zeros;
}

template <class S>
__device__ Four<Accumulate<S>> load_four(const S* at) {
  const Four<S> raw = *reinterpret_cast<const Four<S>*>(at);
  Four<Accumulate<S>> wide;
#pragma unroll
  for (int i = 0; i < kVector; ++i) wide.v[i] = widen(raw.v[i]);
  return wide;
}

// In pieces of 16 bytes (of 8 for half types). __stcg, because the compiler parts an ordinary store into four.
template <class S>
__device__ void store_four(const Four<S>& values, S* at) {
  using Piece = std::conditional_t<sizeof(Four<S>) == sizeof(uint2), uint2, uint4>;
  constexpr int kPieces = sizeof(Four<S>) / sizeof(Piece);
  Piece pieces[kPieces];
  memcpy(pieces, &values, sizeof values);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) __stcg(reinterpret_cast<Piece*>(at) + i, pieces[i]);
}

// Four pixels from p on, stride apart; zero where there are no more.
template <class S>
__device__ Four<Accumulate<S>> load_pixels(const S* line, int64_t stride, int64_t p, int64_t pixels, bool vector) {
  if (vector) return p < pixels ? load_four(line + p) : none<Accumulate<S>>();
  Four<Accumulate<S>> values;
#pragma unroll
  for (int i = 0; i < kVector; ++i) values.v[i] = p + i < pixels ? widen(line[(p + i) * stride]) : Accumulate<S>(0);
  return values;
}

template <class S>
__device__ void store_pixels(const Four<Accumulate<S>>& values, S* line, int64_t stride, int64_t p, int64_t pixels,
                             bool vector) {
  if (vector) {
    if (p >= pixels) return;
    Four<S> narrowed;
#pragma unroll
    for (int i = 0; i < kVector; ++i) narrowed.v[i] = narrow<S>(values.v[i]);
    store_four(narrowed, line + p);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    if (p + i < pixels) line[(p + i) * stride] = narrow<S>(values.v[i]);
}

// ---------------------------------------------------------------------------------------------- moments

constexpr int64_t kPartPixels = 4096, kPartElements = 16384;  // of a sample that one block sums: at most

struct MomentParts {
  int64_t pixel_parts, channel_parts;
  int part_pixels, part_channels;

  MomentParts(int64_t pixels, int channels) {
    part_pixels = static_cast<int>(pixels < kPartPixels ? pixels : kPartPixels);
    pixel_parts = ceil_div(pixels, part_pixels);
    part_channels = static_cast<int>(kPartElements / part_pixels);
    channel_parts = ceil_div(channels, part_channels);
  }
  SIB_HOST_DEVICE int64_t count() const { return pixel_parts * channel_parts; }
};

template <class T>
__device__ void add_moments(T r, T value, T m, T* sums) {
  const T a = r * m, b = value * m, c = r * (T(1) - m);
  sums[0] += a;
  sums[1] += b;
  sums[2] += a * a;
  sums[3] += b * b;
  sums[4] += a * b;
  sums[5] += c;
  sums[6] += c * c;
  const T size = r < 0 ? -r : r;
  sums[7] += size * m;
  sums[8] += size * (T(1) - m);
}

// At least two blocks a multiprocessor: without a number the compiler allows double too few registers, and it spills.
template <class S>
__global__ void __launch_bounds__(kBlock, 2) moments_kernel(Fields<S> in, MomentParts parts, double* partials) {
  using T = Accumulate<S>;
  const int64_t sample = blockIdx.x / parts.count(), part = blockIdx.x % parts.count();
  const int64_t first = part % parts.pixel_parts * parts.part_pixels;
  const int64_t first_channel = part / parts.pixel_parts * parts.part_channels;
  const int64_t rest = in.pixels - first, rest_channels = in.channels - first_channel;
  const unsigned pixels = rest < parts.part_pixels ? rest : parts.part_pixels;
  const unsigned channels = rest_channels < parts.part_channels ? rest_channels : parts.part_channels;
  const S* R = in.R + sample * in.layout_R.batch + first_channel * in.layout_R.channel + first * in.layout_R.pixel;
  const S* x = in.x + sample * in.layout_x.batch + first_channel * in.layout_x.channel + first * in.layout_x.pixel;
  const T* M = in.M + sample * in.pixels + first;

  T sums[kMoments] = {};
  if (in.vector) {
    const unsigned fours = pixels / kVector;
    for (unsigned item = threadIdx.x; item < fours * channels; item += kBlock) {
      const unsigned c = item / fours, p = item % fours * kVector;
      const Four<T> m = load_four(M + p);
      const Four<T> r = load_four(R + c * in.layout_R.channel + p), value = load_four(x + c * in.layout_x.channel + p);
#pragma unroll
      for (int i = 0; i < kVector; ++i) add_moments(r.v[i], value.v[i], m.v[i], sums);
    }
  } else {
    // In the order of memory: neighbouring threads at neighbouring channels, if those are neighbours.
    const bool by_channel = in.layout_R.channel == 1;
    for (unsigned i = threadIdx.x; i < pixels * channels; i += kBlock) {
      const unsigned p = by_channel ? i / channels : i % pixels, c = by_channel ? i % channels : i / pixels;
      add_moments(widen(R[c * in.layout_R.channel + p * in.layout_R.pixel]),
                  widen(x[c * in.layout_x.channel + p * in.layout_x.pixel]), M[p], sums);
    }
  }
  constexpr int kWarps = kBlock / kWarp;
  double* scratch = reinterpret_cast<double*>(block_memory());  // [kMoments][kWarps]
#pragma unroll
  for (int i = 0; i < kMoments; ++i) {
    const double of_warp = warp_sum(static_cast<double>(sums[i]));
    if (threadIdx.x % kWarp == 0) scratch[i * kWarps + threadIdx.x / kWarp] = of_warp;
  }
  __syncthreads();
  if (threadIdx.x >= kMoments) return;
  double total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += scratch[threadIdx.x * kWarps + warp];
  partials[blockIdx.x * static_cast<int64_t>(kMoments) + threadIdx.x] = total;
}

// One block a sample, one warp a moment.
template <class T>
__global__ void finish_moments_kernel(const double* partials, int64_t parts, T* moments) {
  const int64_t sample = blockIdx.x;
  const int moment = threadIdx.x / kWarp;
  double total = 0;
  for (int64_t part = threadIdx.x % kWarp; part < parts; part += kWarp)
    total += partials[(sample * parts + part) * kMoments + moment];
  total = warp_sum(total);
  if (threadIdx.x % kWarp == 0) moments[sample * kMoments + moment] = static_cast<T>(total);
}

// ------------------------------------------------------------------------------------------------- Grams

// The samples of one field as rows of masked elements, in the order of memory.
template <class S>
struct Rows {
  using T = Accumulate<S>;
  const S* field;
  const T* M;
  int64_t batch, elements, pixels;
  int channels;
  bool channels_last, vector;
};

// The pixel of an element that moves on in steps, without a division of 64-bit numbers at each.
struct Cursor {
  uint32_t pixel, channel;

  template <class S>
  __device__ Cursor(const Rows<S>& rows, int64_t element)
      : pixel(static_cast<uint32_t>(rows.channels_last ? element / rows.channels : element % rows.pixels)),
        channel(static_cast<uint32_t>(rows.channels_last ? element % rows.channels : 0)) {}

  template <class S>
  __device__ void advance(const Rows<S>& rows, uint32_t step) {
    if (rows.channels_last) {
      channel += step;
      pixel += channel / rows.channels;
      channel %= static_cast<uint32_t>(rows.channels);
    } else {
      pixel += step;
      if (pixel >= rows.pixels) pixel %= static_cast<uint32_t>(rows.pixels);
    }
  }
};

// Four masked elements of a row; zero beyond its end and for rows beyond the batch.
template <class S>
__device__ Four<Accumulate<S>> masked_elements(const Rows<S>& rows, int64_t row, int64_t element, int64_t end,
                                               const Cursor& at) {
  using T = Accumulate<S>;
  Four<T> product = none<T>();
  if (row >= rows.batch || element >= end) return product;
  const S* values = rows.field + row * rows.elements + element;
  const T* M = rows.M + row * rows.pixels;
  if (rows.vector) {
    const Four<T> value = load_four(values), m = load_four(M + at.pixel);
#pragma unroll
    for (int i = 0; i < kVector; ++i) product.v[i] = value.v[i] * m.v[i];
    return product;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    Cursor here = at;
    here.advance(rows, i);
    if (element + i < end) product.v[i] = widen(values[i]) * M[here.pixel];
  }
  return product;
}

// The row and the column of the n-th tile of a lower triangle.
struct TilePair {
  int row = 0, column;

  SIB_HOST_DEVICE explicit TilePair(int64_t n) {
    while (n > row) n -= ++row;
    column = static_cast<int>(n);
  }
};

constexpr int kGramBlocks = 4;  // on a multiprocessor at once

struct GramPlan {
  int64_t pairs, splits, split_elements;

  GramPlan(int64_t batch, int64_t elements, int tile, int depth, int64_t element_bytes, int multiprocessors) {
    const int64_t tiles = ceil_div(batch, tile), chunks = ceil_div(elements, depth);
    pairs = tiles * (tiles + 1) / 2;
    // Enough blocks to fill the device, sums in T not too long, and not too much memory for the partial results.
    const int64_t to_fill = kGramBlocks * multiprocessors / pairs, for_accuracy = ceil_div(elements, 8192);
    const int64_t affordable = (int64_t(64) << 20) / (pairs * tile * tile * element_bytes);
    int64_t wanted = to_fill > for_accuracy ? to_fill : for_accuracy;
    wanted = wanted < affordable ? wanted : affordable;
    wanted = wanted < 1 ? 1 : wanted < chunks ? wanted : chunks;
    split_elements = ceil_div(chunks, wanted) * depth;
    splits = ceil_div(elements, split_elements);
  }
};

template <int Tile>
constexpr int kDepth = kBlock * kVector / Tile;  // elements of a row that are in shared memory at once

// How far apart the rows of a tile are in shared memory.
template <int Tile, bool Tensor>
constexpr int kTileStride = Tensor ? kTensorStride : Tile;

template <class S, int Tile, bool Tensor>
constexpr int64_t gram_shared_bytes() {
  constexpr int groups = kBlock / ((Tile / kMicro) * (Tile / kMicro));
  constexpr int64_t operands = 2 * kDepth<Tile> * kTileStride<Tile, Tensor>, sums = groups > 1 ? groups * Tile * Tile : 0;
  return (operands > sums ? operands : sums) * sizeof(Accumulate<S>);
}

// partials[split][pair] = one tile of the Gram over one split. A small tile is formed by several groups of threads, each
// taking every so many-th element. Tensor: on tensor cores.
template <class S, int Tile, bool Tensor>
__global__ void __launch_bounds__(kBlock, sizeof(S) == sizeof(double) ? 2 : kGramBlocks)
    gram_kernel(Rows<S> rows, GramPlan plan, Accumulate<S>* partials) {
  using T = Accumulate<S>;
  constexpr int kLanes = Tile / kMicro, kGroups = kBlock / (kLanes * kLanes), kStride = kTileStride<Tile, Tensor>;
  // Neighbouring threads load neighbours of one sample; the swizzle lets a warp store them without conflicts of banks.
  constexpr int kVectors = kDepth<Tile> / kVector, kSwizzle = kWarp / kVectors;
  const int64_t split = blockIdx.x / plan.pairs, pair = blockIdx.x % plan.pairs;
  const TilePair tile(pair);
  const bool diagonal = tile.row == tile.column;
  T* left = reinterpret_cast<T*>(block_memory());  // [kDepth][kStride]
  T* right = diagonal ? left : left + kDepth<Tile> * kStride;

  const int row = threadIdx.x / kVectors, vector = threadIdx.x % kVectors;
  const int group = threadIdx.x / (kLanes * kLanes), lane = threadIdx.x % (kLanes * kLanes);
  const int y = lane / kLanes * kMicro, x = lane % kLanes * kMicro;
  const int64_t begin = split * plan.split_elements;
  const int64_t end = begin + plan.split_elements < rows.elements ? begin + plan.split_elements : rows.elements;
  int64_t element = begin + vector * kVector;
  Cursor at(rows, element);
  const auto load = [&](int which) {
    return masked_elements(rows, static_cast<int64_t>(which) * Tile + row, element, end, at);
  };

  [[maybe_unused]] T sums[kMicro][kMicro] = {};
  [[maybe_unused]] std::conditional_t<Tensor, TensorProduct<kSwizzle>, int> product{};
  Four<T> next_left = load(tile.row), next_right = diagonal ? none<T>() : load(tile.column);
  for (int64_t start = begin; start < end; start += kDepth<Tile>) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int place = (vector * kVector + i) * kStride + (row ^ vector * kSwizzle);
      left[place] = next_left.v[i];
      if (!diagonal) right[place] = next_right.v[i];
    }
    __syncthreads();
    element += kDepth<Tile>;
    at.advance(rows, kDepth<Tile>);
    next_left = load(tile.row);
    if (!diagonal) next_right = load(tile.column);
    if constexpr (Tensor) {
#pragma unroll
      for (int k = 0; k < kDepth<Tile>; k += kTensorRows) product.add(left, right, k);
    } else {
#pragma unroll
      for (int k = group; k < kDepth<Tile>; k += kGroups) {
        const int swizzle = k / kVector * kSwizzle;
        const Four<T> l = *reinterpret_cast<const Four<T>*>(left + k * kStride + (y ^ swizzle));
        const Four<T> r = *reinterpret_cast<const Four<T>*>(right + k * kStride + (x ^ swizzle));
#pragma unroll
        for (int i = 0; i < kMicro; ++i)
#pragma unroll
          for (int j = 0; j < kMicro; ++j) sums[i][j] += l.v[i] * r.v[j];
      }
    }
    __syncthreads();
  }

  T* out = partials + blockIdx.x * static_cast<int64_t>(Tile * Tile);
  if constexpr (Tensor) {
    product.store(out, Tile);
    return;
  }
  T* into = kGroups > 1 ? left + group * Tile * Tile : out;
#pragma unroll
  for (int i = 0; i < kMicro; ++i)
#pragma unroll
    for (int j = 0; j < kMicro; ++j) into[(y + i) * Tile + x + j] = sums[i][j];
  if (kGroups > 1) {
    __syncthreads();
    for (int i = threadIdx.x; i < Tile * Tile; i += kBlock) {
      T total = 0;
      for (int other = 0; other < kGroups; ++other) total += left[other * Tile * Tile + i];
      out[i] = total;
    }
  }
}

// Adds the splits: a block takes 32 values of the tiles, each of its warps every eighth split.
template <class T>
__global__ void __launch_bounds__(kBlock)
    finish_gram_kernel(const T* partials, GramPlan plan, int tile, int64_t batch, T* gram) {
  double* sums = reinterpret_cast<double*>(block_memory());
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t values = plan.pairs * tile * tile, value = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  double total = 0;
  for (int64_t split = warp; split < plan.splits; split += kBlock / kWarp) total += partials[split * values + value];
  sums[threadIdx.x] = total;
  __syncthreads();
  if (warp != 0) return;
  total = 0;
  for (int i = 0; i < kBlock / kWarp; ++i) total += sums[i * kWarp + lane];
  const TilePair at(value / (tile * tile));
  const int64_t i = static_cast<int64_t>(at.row) * tile + value / tile % tile;
  const int64_t j = static_cast<int64_t>(at.column) * tile + value % tile;
  if (i < batch && j <= i) gram[i * batch + j] = gram[j * batch + i] = static_cast<T>(total);
}

// ---------------------------------------------------------------------------------------------- backward

constexpr int64_t kWeightsAlignment = 64;  // rows and columns of G + G^T are padded to it with zeros

template <class T>
__global__ void symmetrise_kernel(const T* G, int64_t batch, int64_t padded, T* weights) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= padded * padded) return;
  const int64_t i = at / padded, j = at % padded;
  weights[at] = i < batch && j < batch ? G[i * batch + j] + G[j * batch + i] : T(0);
}

template <class S>
struct BackwardProblem {
  using T = Accumulate<S>;
  const T* moments;             // dL/dmoments [B,9]
  const T *weights_a, *weights_b;  // padded G + G^T; null where a Gram has no cotangent
  int64_t padded;
  S *grad_R, *grad_x;  // grad_x may be null
  T* grad_M;           // [groups,B,P]
  int64_t pixel_tiles, row_tiles;
  int group_channels;
};

// sums += weights [Samples, batch] @ rows of four pixels a thread, for one channel of one field.
template <class S, int Samples, bool Tensor>
__device__ void add_products(const Fields<S>& in, const S* field, const Layout& layout, const Accumulate<S>* weights,
                             int64_t padded, int64_t first_row, int64_t first_pixel, int channel,
                             Accumulate<S> (&sums)[kMicro][kVector]) {
  using T = Accumulate<S>;
  constexpr int kPixels = 16 * kBlock / Samples, kAcross = kPixels / kVector, kDeep = kBlock / kAcross;
  constexpr int kStride = kTileStride<kPixels, Tensor>, kScaleStride = kTileStride<Samples, Tensor>;
  T* values = reinterpret_cast<T*>(block_memory());  // [kDeep][kStride]
  T* scales = values + kDeep * kStride;              // [kDeep][kScaleStride]
  [[maybe_unused]] std::conditional_t<Tensor, TensorProduct<0>, int> product{};
  const int x = threadIdx.x % kAcross * kVector, y = threadIdx.x / kAcross;
  const int64_t p = first_pixel + x;
  const auto load = [&](int64_t row) {
    Four<T> product = none<T>();
    if (row >= in.batch) return product;
    const S* line = field + row * layout.batch + channel * layout.channel;
    const Four<T> value = load_pixels(line, layout.pixel, p, in.pixels, in.vector);
    const Four<T> m = load_pixels(in.M + row * in.pixels, 1, p, in.pixels, in.vector);
#pragma unroll
    for (int i = 0; i < kVector; ++i) product.v[i] = value.v[i] * m.v[i];
    return product;
  };
  // Of a square tile, four weights a thread, in the order of the values; the other kernels lack the registers.
  [[maybe_unused]] const T* from = weights + y * padded + first_row + x;
  static_assert(!Tensor || kPixels == Samples);
  Four<T> next = load(y);
  [[maybe_unused]] Four<T> next_weights;
  if constexpr (Tensor) next_weights = load_four(from);
  for (int64_t start = 0; start < in.batch; start += kDeep) {
    *reinterpret_cast<Four<T>*>(values + y * kStride + x) = next;
    if constexpr (Tensor) {
      *reinterpret_cast<Four<T>*>(scales + y * kScaleStride + x) = next_weights;
    } else {
      for (int i = threadIdx.x; i < kDeep * Samples; i += kBlock)
        scales[i / Samples * kScaleStride + i % Samples] = weights[(start + i / Samples) * padded + first_row + i % Samples];
    }
    __syncthreads();
    next = load(start + kDeep + y);
    if constexpr (Tensor) {
      from += kDeep * padded;
      if (start + kDeep < in.batch) next_weights = load_four(from);
#pragma unroll
      for (int k = 0; k < kDeep; k += kTensorRows) product.add(scales, values, k);
    } else {
#pragma unroll
      for (int k = 0; k < kDeep; ++k) {
        const Four<T> scale = *reinterpret_cast<const Four<T>*>(scales + k * kScaleStride + y * kMicro);
        const Four<T> value = *reinterpret_cast<const Four<T>*>(values + k * kStride + x);
#pragma unroll
        for (int i = 0; i < kMicro; ++i)
#pragma unroll
          for (int j = 0; j < kVector; ++j) sums[i][j] += scale.v[i] * value.v[j];
      }
    }
    __syncthreads();
  }
  if constexpr (Tensor) {
    // From the warps' order to the threads' own 4 x 4 values.
    product.store(values, kStride);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {
      const Four<T> line = *reinterpret_cast<const Four<T>*>(values + (y * kMicro + i) * kStride + x);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sums[i][j] = line.v[j];
    }
    __syncthreads();
  }
}

template <class S, int Samples, bool Tensor>
constexpr int64_t backward_shared_bytes() {
  constexpr int pixels = 16 * kBlock / Samples, rows = kBlock * kVector / pixels;
  constexpr int64_t operands = rows * (kTileStride<pixels, Tensor> + kTileStride<Samples, Tensor>);
  constexpr int64_t result = Tensor ? Samples * kTileStride<pixels, Tensor> : 0;
  return (operands > result ? operands : result) * sizeof(Accumulate<S>);
}

// A block has a tile of samples x pixels, a thread 4 x 4 of it, and a group of channels.
template <class S, int Samples, bool Tensor>
__global__ void __launch_bounds__(kBlock) statistics_backward_kernel(Fields<S> in, BackwardProblem<S> g) {
  using T = Accumulate<S>;
  constexpr int kPixels = 16 * kBlock / Samples, kAcross = kPixels / kVector;
  const int64_t row_tile = blockIdx.x % g.row_tiles, pixel_tile = blockIdx.x / g.row_tiles % g.pixel_tiles;
  const int64_t group = blockIdx.x / (g.row_tiles * g.pixel_tiles);
  const int64_t first_row = row_tile * Samples, first_pixel = pixel_tile * kPixels;
  const int64_t p = first_pixel + threadIdx.x % kAcross * kVector, row = first_row + threadIdx.x / kAcross * kMicro;
  const int first_channel = static_cast<int>(group) * g.group_channels;
  const int last_channel = first_channel + g.group_channels < in.channels ? first_channel + g.group_channels : in.channels;

  T grad_M[kMicro][kVector] = {};
  for (int c = first_channel; c < last_channel; ++c) {
    T from_a[kMicro][kVector] = {}, from_b[kMicro][kVector] = {};
    if (g.weights_a)
      add_products<S, Samples, Tensor>(in, in.R, in.layout_R, g.weights_a, g.padded, first_row, first_pixel, c, from_a);
    if (g.weights_b)
      add_products<S, Samples, Tensor>(in, in.x, in.layout_x, g.weights_b, g.padded, first_row, first_pixel, c, from_b);
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {
      if (row + i >= in.batch) continue;
      const int64_t at_R = (row + i) * in.layout_R.batch + c * in.layout_R.channel;
      const int64_t at_x = (row + i) * in.layout_x.batch + c * in.layout_x.channel;
      const Four<T> m = load_pixels(in.M + (row + i) * in.pixels, 1, p, in.pixels, in.vector);
      const Four<T> r = load_pixels(in.R + at_R, in.layout_R.pixel, p, in.pixels, in.vector);
      const Four<T> value = load_pixels(in.x + at_x, in.layout_x.pixel, p, in.pixels, in.vector);
      const T* by = g.moments + (row + i) * kMoments;
      Four<T> grad_R, grad_x;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const T a = r.v[j] * m.v[j], b = value.v[j] * m.v[j], rest = T(1) - m.v[j];
        const T sign = static_cast<T>((r.v[j] > 0) - (r.v[j] < 0));
        const T grad_a = by[0] + 2 * by[2] * a + by[4] * b + by[7] * sign + from_a[i][j];
        const T grad_b = by[1] + 2 * by[3] * b + by[4] * a + from_b[i][j];
        const T grad_c = by[5] + 2 * by[6] * (r.v[j] * rest) + by[8] * sign;
        grad_R.v[j] = grad_a * m.v[j] + grad_c * rest;
        grad_x.v[j] = grad_b * m.v[j];
        grad_M[i][j] += (grad_a - grad_c) * r.v[j] + grad_b * value.v[j];
      }
      store_pixels(grad_R, g.grad_R + at_R, in.layout_R.pixel, p, in.pixels, in.vector);
      if (g.grad_x) store_pixels(grad_x, g.grad_x + at_x, in.layout_x.pixel, p, in.pixels, in.vector);
    }
  }
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    if (row + i >= in.batch) continue;
    Four<T> values;
#pragma unroll
    for (int j = 0; j < kVector; ++j) values.v[j] = grad_M[i][j];
    store_pixels(values, g.grad_M + (group * in.batch + row + i) * in.pixels, 1, p, in.pixels, in.vector);
  }
}

template <class T>
__global__ void add_groups_kernel(const T* partials, int64_t groups, int64_t count, T* out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= count) return;
  T total = 0;
  for (int64_t group = 0; group < groups; ++group) total += partials[group * count + at];
  out[at] = total;
}

// ------------------------------------------------------------------------------------------ the launches

template <class S>
Fields<S> make_fields(const S* R, const S* x, const Accumulate<S>* M, const Layout& layout_R, const Layout& layout_x,
                      int64_t batch, int channels, int64_t pixels) {
  const bool vector = layout_R.pixel == 1 && layout_x.pixel == 1 && vectorisable(R, pixels, sizeof(S)) &&
                      vectorisable(x, pixels, sizeof(S)) && vectorisable(M, pixels, sizeof(Accumulate<S>));
  return {R, x, M, layout_R, layout_x, batch, pixels, channels, vector};
}

template <class S>
void launch_moments(const Fields<S>& in, const Device& device, Accumulate<S>* moments) {
  const MomentParts parts(in.pixels, in.channels);
  double* partials = device.array<double>(in.batch * parts.count() * kMoments);
  launch(device, moments_kernel<S>, in.batch * parts.count(), kBlock, kMoments * kBlock / kWarp * sizeof(double), in,
         parts, partials);
  launch(device, finish_moments_kernel<Accumulate<S>>, in.batch, kMoments * kWarp, 0, partials, parts.count(), moments);
}

template <class S, int Tile, bool Tensor>
void launch_gram(const Rows<S>& rows, const Device& device, Accumulate<S>* gram) {
  using T = Accumulate<S>;
  const GramPlan plan(rows.batch, rows.elements, Tile, kDepth<Tile>, sizeof(T), device.multiprocessors);
  const int64_t values = plan.pairs * Tile * Tile;
  T* partials = device.array<T>(plan.splits * values);
  launch(device, gram_kernel<S, Tile, Tensor>, plan.splits * plan.pairs, kBlock,
         gram_shared_bytes<S, Tile, Tensor>(), rows, plan, partials);
  launch(device, finish_gram_kernel<T>, values / kWarp, kBlock, kBlock * sizeof(double), partials, plan, Tile, rows.batch,
         gram);
}

// Calls f(tile, tensor): tiles of 32 samples for small batches and for float64, of 64 for the others, those on tensor
// cores where there are any.
template <class S, class F>
void with_tile(int64_t batch, const Device& device, F f) {
  if constexpr (!std::is_same_v<S, double>) {
    if (batch > 32 && device.tensor_cores) return f(std::integral_constant<int, 64>{}, std::true_type{});
    if (batch > 32) return f(std::integral_constant<int, 64>{}, std::false_type{});
  }
  f(std::integral_constant<int, 32>{}, std::false_type{});
}

template <class S>
void launch_gram(const Rows<S>& rows, const Device& device, Accumulate<S>* gram) {
  with_tile<S>(rows.batch, device, [&](auto tile, auto tensor) {
    launch_gram<S, decltype(tile)::value, decltype(tensor)::value>(rows, device, gram);
  });
}

template <class S>
Rows<S> rows_of(const Fields<S>& in, const S* field, const Layout& layout) {
  return {field,       in.M,        in.batch, in.channels * in.pixels,
          in.pixels,   in.channels, layout.pixel != 1,
          layout.pixel == 1 && vectorisable(field, in.pixels, sizeof(S)) &&
              vectorisable(in.M, in.pixels, sizeof(Accumulate<S>))};
}

// Both Grams of 65 to 128 samples.
template <class S>
void launch_in_one_pass(const Fields<S>& in, const Device& device, float* moments, float* gram_R, float* gram_x);

// A Gram whose pointer is null is not wanted.
template <class S>
void statistics_forward(const Fields<S>& in, const Device& device, Accumulate<S>* moments, Accumulate<S>* gram_R,
                        Accumulate<S>* gram_x) {
  if (in.batch == 0) return;
  if constexpr (!std::is_same_v<S, double>) {
    const bool in_one_pass = in.batch > 64 && in.batch <= 128 && in.vector && device.tensor_cores &&
                             in.channels * in.pixels <= INT32_MAX;
    if (in_one_pass && gram_R && gram_x) return launch_in_one_pass(in, device, moments, gram_R, gram_x);
  }
  launch_moments(in, device, moments);
  if (gram_R) launch_gram(rows_of(in, in.R, in.layout_R), device, gram_R);
  if (gram_x) launch_gram(rows_of(in, in.x, in.layout_x), device, gram_x);
}

template <class T>
T* launch_symmetrise(const T* G, int64_t batch, int64_t padded, const Device& device) {
  if (!G) return nullptr;
  T* weights = device.array<T>(padded * padded);
  launch(device, symmetrise_kernel<T>, ceil_div(padded * padded, kBlock), kBlock, 0, G, batch, padded, weights);
  return weights;
}

// Cotangents of Grams and grad_x may be null.
template <class S>
struct StatisticsGradients {
  using T = Accumulate<S>;
  const T *moments, *gram_R, *gram_x;
  S *R, *x;
  T* M;
};

template <class S, int Samples, bool Tensor>
void launch_backward(const Fields<S>& in, const StatisticsGradients<S>& grad, const Device& device) {
  using T = Accumulate<S>;
  const int64_t padded = ceil_div(in.batch, kWeightsAlignment) * kWeightsAlignment;
  const int64_t row_tiles = ceil_div(in.batch, Samples), pixel_tiles = ceil_div(in.pixels, 16 * kBlock / Samples);
  // Groups of channels where the tiles alone do not fill the device.
  int64_t groups = ceil_div(4 * device.multiprocessors, row_tiles * pixel_tiles);
  groups = groups < in.channels ? groups : in.channels;
  const int group_channels = static_cast<int>(ceil_div(in.channels, groups));
  groups = ceil_div(in.channels, group_channels);
  const int64_t count = in.batch * in.pixels;
  const BackwardProblem<S> g{grad.moments,
                             launch_symmetrise(grad.gram_R, in.batch, padded, device),
                             launch_symmetrise(grad.gram_x, in.batch, padded, device),
                             padded,
                             grad.R,
                             grad.x,
                             groups == 1 ? grad.M : device.array<T>(groups * count),
                             pixel_tiles,
                             row_tiles,
                             group_channels};
  launch(device, statistics_backward_kernel<S, Samples, Tensor>, groups * pixel_tiles * row_tiles, kBlock,
         backward_shared_bytes<S, Samples, Tensor>(), in, g);
  if (groups > 1) {
    launch(device, add_groups_kernel<T>, ceil_div(count, kBlock), kBlock, 0, g.grad_M, groups, count, grad.M);
  }
}

template <class S>
void statistics_backward(Fields<S> in, const StatisticsGradients<S>& grad, const Device& device) {
  if (in.batch == 0) return;
  in.vector = in.vector && vectorisable(grad.R, in.pixels, sizeof(S)) && vectorisable(grad.x, in.pixels, sizeof(S)) &&
              vectorisable(grad.M, in.pixels, sizeof(Accumulate<S>));
  with_tile<S>(in.batch, device, [&](auto samples, auto tensor) {
    launch_backward<S, decltype(samples)::value, decltype(tensor)::value>(in, grad, device);
  });
}

}  // namespace sib_ext::cuda

#include "statistics_in_one_pass.cuh"
