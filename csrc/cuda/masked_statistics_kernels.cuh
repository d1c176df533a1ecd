// masked_statistics on a GPU: a = R*M, b = x*M and c = R*(1-M) exist in registers and shared memory only.
//
// Moments: each block sums a part of a sample, a second launch adds the parts. Grams: the elements of a sample are cut
// into splits; a block forms one tile of the product over one split, a second launch adds the splits. Backward of Grams:
// a block holds a tile of samples x pixels, goes through its channels, multiplies by G + G^T, and keeps dL/dM in
// registers. Backward of moments alone: elementwise. All cuts depend on the sizes (and the number of multiprocessors) alone, and all sums run in a fixed order.
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
  bool vector;     // four pixels can be loaded and stored at once
  bool one_field;  // x is R, which is then read once
};

template <class T>
__device__ Four<T> none() {
  Four<T> zeros;
#pragma unroll
  for (int i = 0; i < kVector; ++i) zeros.v[i] = T{};
  return zeros;
}

template <class T>
__device__ Four<T> load_four(const T* at) {
  return *reinterpret_cast<const Four<T>*>(at);
}

// Four values as they lie in memory, in whole words: what is loaded ahead is unpacked, converted and multiplied where it
// is used, since whatever came right after the load would wait for it.
template <class S>
struct alignas(alignof(Four<S>)) Packed {
  uint32_t words[sizeof(Four<S>) / sizeof(uint32_t)] = {};

  __device__ Four<Accumulate<S>> wide() const {
    Four<S> values;
    memcpy(&values, words, sizeof values);
    Four<Accumulate<S>> widened;
#pragma unroll
    for (int i = 0; i < kVector; ++i) widened.v[i] = widen(values.v[i]);
    return widened;
  }
};

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

template <class S>
__device__ Packed<S> load_packed(const S* at) {
  return *reinterpret_cast<const Packed<S>*>(at);
}

// Four pixels from p on, stride apart; zero where there are no more.
template <bool Vector, class S>
__device__ Packed<S> load_pixels(const S* line, int64_t stride, int64_t p, int64_t pixels) {
  Packed<S> packed;
  if constexpr (Vector) {
    if (p < pixels) packed = load_packed(line + p);
  } else {
    Four<S> values = none<S>();
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (p + i < pixels) values.v[i] = line[(p + i) * stride];
    memcpy(packed.words, &values, sizeof values);
  }
  return packed;
}

template <bool Vector, class S>
__device__ void store_pixels(const Four<Accumulate<S>>& values, S* line, int64_t stride, int64_t p, int64_t pixels) {
  if constexpr (Vector) {
    if (p >= pixels) return;
    Four<S> narrowed;
#pragma unroll
    for (int i = 0; i < kVector; ++i) narrowed.v[i] = narrow<S>(values.v[i]);
    store_four(narrowed, line + p);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (p + i < pixels) line[(p + i) * stride] = narrow<S>(values.v[i]);
  }
}

// Four values of a field and of the mask over them, not multiplied yet.
template <class S>
struct Masked {
  using T = Accumulate<S>;
  Packed<S> value;
  Packed<T> m;

  __device__ Four<T> product() const {
    Four<T> products = value.wide();
    const Four<T> factors = m.wide();
#pragma unroll
    for (int i = 0; i < kVector; ++i) products.v[i] *= factors.v[i];
    return products;
  }
};

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

constexpr int kMomentsAtOnce = 2;  // fours of pixels of a thread that are under way at once

// At least two blocks a multiprocessor: without a number the compiler allows double too few registers, and it spills.
template <class S, bool Vector, bool OneField>
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
  if constexpr (Vector) {
    const unsigned fours = pixels / kVector, channel_step = kBlock / fours, four_step = kBlock % fours;
    unsigned c = threadIdx.x / fours, four = threadIdx.x % fours;
    while (c < channels) {
      Packed<S> r[kMomentsAtOnce], value[kMomentsAtOnce];
      Packed<T> m[kMomentsAtOnce];
#pragma unroll
      for (int i = 0; i < kMomentsAtOnce; ++i) {
        const unsigned last = c < channels ? pixels : 0, p = four * kVector;
        m[i] = load_pixels<Vector>(M, 1, p, last);
        r[i] = load_pixels<Vector>(R + c * in.layout_R.channel, 1, p, last);
        if (!OneField) value[i] = load_pixels<Vector>(x + c * in.layout_x.channel, 1, p, last);
        c += channel_step;
        four += four_step;
        if (four >= fours) {
          four -= fours;
          ++c;
        }
      }
#pragma unroll
      for (int i = 0; i < kMomentsAtOnce; ++i) {
        const Four<T> of_R = r[i].wide(), of_x = OneField ? of_R : value[i].wide(), of_M = m[i].wide();
#pragma unroll
        for (int j = 0; j < kVector; ++j) add_moments(of_R.v[j], of_x.v[j], of_M.v[j], sums);
      }
    }
  } else {
    // In the order of memory: neighbouring threads at neighbouring channels, if those are neighbours.
    const bool by_channel = in.layout_R.channel == 1;
    for (unsigned i = threadIdx.x; i < pixels * channels; i += kBlock) {
      const unsigned p = by_channel ? i / channels : i % pixels, c = by_channel ? i % channels : i / pixels;
      const T r = widen(R[c * in.layout_R.channel + p * in.layout_R.pixel]);
      add_moments(r, OneField ? r : widen(x[c * in.layout_x.channel + p * in.layout_x.pixel]), M[p], sums);
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
  bool channels_last, vector;  // vector: as in Fields
};

// The pixel of an element that moves on in steps, without a division of 64-bit numbers at each. Fields that are read
// in fours are contiguous.
template <bool Vector>
struct Cursor {
  uint32_t pixel, channel = 0;

  template <class S>
  __device__ Cursor(const Rows<S>& rows, int64_t element) {
    const bool channels_last = !Vector && rows.channels_last;
    pixel = static_cast<uint32_t>(channels_last ? element / rows.channels : element % rows.pixels);
    if (channels_last) channel = static_cast<uint32_t>(element % rows.channels);
  }

  template <class S>
  __device__ void advance(const Rows<S>& rows, uint32_t step) {
    if (!Vector && rows.channels_last) {
      channel += step;
      pixel += channel / rows.channels;
      channel %= static_cast<uint32_t>(rows.channels);
    } else {
      const uint32_t pixels = static_cast<uint32_t>(rows.pixels);
      pixel += step;
      while (pixel >= pixels) pixel -= pixels;
    }
  }
};

// A sample's row from a split's first element on; null for rows beyond the batch.
template <class S, bool Vector>
struct Row {
  using T = Accumulate<S>;
  const S* values = nullptr;
  const T* M = nullptr;

  __device__ Row(const Rows<S>& rows, int64_t row, int64_t begin) {
    if (row >= rows.batch) return;
    values = rows.field + row * rows.elements + begin;
    M = rows.M + row * rows.pixels;
  }

  // Four elements and their mask; zero from the split's end on.
  __device__ Masked<S> load(const Rows<S>& rows, uint32_t element, uint32_t end, const Cursor<Vector>& at) const {
    Masked<S> four;
    if (!values || element >= end) return four;
    if constexpr (Vector) {
      four.value = load_packed(values + element);
      four.m = load_packed(M + at.pixel);
    } else {
      Four<S> value = none<S>();
      Four<T> m = none<T>();
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        Cursor<Vector> here = at;
        here.advance(rows, i);
        if (element + i < end) {
          value.v[i] = values[element + i];
          m.v[i] = M[here.pixel];
        }
      }
      memcpy(four.value.words, &value, sizeof value);
      memcpy(four.m.words, &m, sizeof m);
    }
    return four;
  }
};

// The row and the column of the n-th tile of a lower triangle.
struct TilePair {
  int row = 0, column;

  SIB_HOST_DEVICE explicit TilePair(int64_t n) {
    while (n > row) n -= ++row;
    column = static_cast<int>(n);
  }
};

constexpr int kGramBlocks = 3;  // on a multiprocessor at once: what is loaded ahead takes the registers of a fourth

// Blocks that the registers are shared out for: where there are three, conversions from half types, other layouts and
// the compiler's code before Hopper spill.
template <class S, bool Vector>
constexpr int gram_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return 2;
#else
  return Vector && sizeof(S) == sizeof(float) ? kGramBlocks : 2;
#endif
}

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
template <class S, int Tile, bool Tensor, bool Vector>
__global__ void __launch_bounds__(kBlock, gram_blocks<S, Vector>())
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
  const int64_t begin = split * plan.split_elements, rest = rows.elements - begin;
  const uint32_t end = rest < plan.split_elements ? rest : plan.split_elements;
  const uint32_t mine = vector * kVector;
  Cursor<Vector> at(rows, begin + mine);
  const Row<S, Vector> left_row(rows, static_cast<int64_t>(tile.row) * Tile + row, begin);
  const Row<S, Vector> right_row(rows, static_cast<int64_t>(tile.column) * Tile + row, begin);

  [[maybe_unused]] T sums[kMicro][kMicro] = {};
  [[maybe_unused]] std::conditional_t<Tensor, TensorProduct<kSwizzle>, int> product{};
  const auto store = [&](const Masked<S>& four, T* into) {
    const Four<T> products = four.product();
    const int at = anew(vector);
#pragma unroll
    for (int i = 0; i < kVector; ++i) into[(at * kVector + i) * kStride + (row ^ at * kSwizzle)] = products.v[i];
  };
  Masked<S> next_left = left_row.load(rows, mine, end, at), next_right;
  if (!diagonal) next_right = right_row.load(rows, mine, end, at);
#pragma unroll 1
  for (uint32_t start = 0; start < end; start += kDepth<Tile>) {
    store(next_left, left);
    if (!diagonal) store(next_right, right);
    __syncthreads();
    at.advance(rows, kDepth<Tile>);
    next_left = left_row.load(rows, start + kDepth<Tile> + mine, end, at);
    if (!diagonal) next_right = right_row.load(rows, start + kDepth<Tile> + mine, end, at);
    if constexpr (Tensor) {
#pragma unroll
      for (int k = 0; k < kDepth<Tile>; k += kTensorRows) product.add(left, right, k);
    } else {
#pragma unroll
      for (int k = group; k < kDepth<Tile>; k += kGroups) {
        const int swizzle = k / kVector * kSwizzle;
        const Four<T> l = *reinterpret_cast<const Four<T>*>(left + k * kStride + (anew(y) ^ swizzle));
        const Four<T> r = *reinterpret_cast<const Four<T>*>(right + k * kStride + (anew(x) ^ swizzle));
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

// Adds the splits: a block takes 32 values of the tiles, each of its warps every eighth split. The second Gram's blocks and
// partials, if there is one, follow the first one's.
template <class T>
__global__ void __launch_bounds__(kBlock)
    finish_gram_kernel(const T* partials, GramPlan plan, int tile, int64_t batch, T* first, T* second) {
  double* sums = reinterpret_cast<double*>(block_memory());
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t values = plan.pairs * tile * tile, at_value = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const bool of_first = at_value < values;
  const int64_t value = of_first ? at_value : at_value - values;
  T* gram = of_first ? first : second;
  if (!of_first) partials += plan.splits * values;
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
  const T *weights_a, *weights_b;  // padded G + G^T; null where a Gram has no cotangent (in one pass: G)
  int64_t padded;
  S *grad_R, *grad_x;          // grad_x may be null
  T* grad_M = nullptr;         // [groups,B,P], or null
  int64_t pixel_tiles = 0, row_tiles = 0;
  int group_channels = 0;
};

// dL/dmoments of one sample.
template <class T>
struct Cotangents {
  T by[kMoments];

  __device__ explicit Cotangents(const T* moments) {
#pragma unroll
    for (int i = 0; i < kMoments; ++i) by[i] = __ldg(moments + i);
  }

  // At one element, r and v of R and x, m of M: dL/dr into grad, from what the Gram says of dL/da; returns its part of
  // dL/dM.
  __device__ T of_R(T r, T v, T m, T from_gram, T& grad) const {
    const T rest = T(1) - m, sign = r == 0 ? T(0) : copysign(T(1), r);
    const T grad_a = by[0] + 2 * by[2] * (r * m) + by[4] * (v * m) + by[7] * sign + from_gram;
    const T grad_c = by[5] + 2 * by[6] * (r * rest) + by[8] * sign;
    grad = grad_a * m + grad_c * rest;
    return (grad_a - grad_c) * r;
  }

  // The same of x.
  __device__ T of_x(T r, T v, T m, T from_gram, T& grad) const {
    const T grad_b = by[1] + 2 * by[3] * (v * m) + by[4] * (r * m) + from_gram;
    grad = grad_b * m;
    return grad_b * v;
  }
};

// A block's tile of samples x pixels, of which a thread has 4 x 4, and one channel of one field.
struct BackwardTile {
  int64_t first_row, first_pixel;
  int channel;
};

// sums += weights [Samples, batch] @ rows of four pixels a thread.
template <class S, int Samples, bool Tensor, bool Vector>
__device__ void add_products(const Fields<S>& in, const S* field, const Layout& layout, const Accumulate<S>* weights,
                             int64_t padded, const BackwardTile& tile, Accumulate<S> (&sums)[kMicro][kVector]) {
  using T = Accumulate<S>;
  constexpr int kPixels = 16 * kBlock / Samples, kAcross = kPixels / kVector, kDeep = kBlock / kAcross;
  constexpr int kStride = kTileStride<kPixels, Tensor>, kScaleStride = kTileStride<Samples, Tensor>;
  T* values = reinterpret_cast<T*>(block_memory());  // [kDeep][kStride]
  T* scales = values + kDeep * kStride;              // [kDeep][kScaleStride]
  [[maybe_unused]] std::conditional_t<Tensor, TensorProduct<0>, int> product{};
  const int thread = anew(threadIdx.x), x = thread % kAcross * kVector, y = thread / kAcross;
  const int64_t p = tile.first_pixel + x;
  const int batch = static_cast<int>(in.batch);
  int row = y;  // that is loaded next
  const S* line = field + row * layout.batch + tile.channel * layout.channel;
  const T* line_M = in.M + row * in.pixels;
  [[maybe_unused]] const int rows = p < in.pixels ? batch : 0;  // this thread's: one condition for a load, or its zeros are copied about
  const auto load = [&] {
    Masked<S> four;
    if constexpr (Vector) {
      if (row < rows) {
        four.value = load_packed(line + p);
        four.m = load_packed(line_M + p);
      }
    } else if (row < batch) {
      four.value = load_pixels<Vector>(line, layout.pixel, p, in.pixels);
      four.m = load_pixels<Vector>(line_M, 1, p, in.pixels);
    }
    row += kDeep;
    line += kDeep * layout.batch;
    line_M += kDeep * in.pixels;
    return four;
  };
  // Of a square tile, four weights a thread, in the order of the values; the other kernels lack the registers.
  [[maybe_unused]] const T* from = weights + y * padded + tile.first_row + x;
  static_assert(!Tensor || kPixels == Samples);
  Masked<S> next = load();
  [[maybe_unused]] Four<T> next_weights;
  if constexpr (Tensor) next_weights = load_four(from);
#pragma unroll 1
  for (int start = 0; start < batch; start += kDeep) {
    *reinterpret_cast<Four<T>*>(values + y * kStride + x) = next.product();
    if constexpr (Tensor) {
      *reinterpret_cast<Four<T>*>(scales + y * kScaleStride + x) = next_weights;
    } else {
      for (int i = threadIdx.x; i < kDeep * Samples; i += kBlock)
        scales[i / Samples * kScaleStride + i % Samples] = weights[(start + i / Samples) * padded + tile.first_row + i % Samples];
    }
    __syncthreads();
    next = load();
    if constexpr (Tensor) {
      from += kDeep * padded;
      if (start + kDeep < batch) next_weights = load_four(from);
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

// One field's gradient in a tile, and its part of dL/dM. R's does not rest on the products of x, nor x's on those of R:
// one after the other, they share registers.
template <class S, int Samples, bool Tensor, bool Vector, bool OfR>
__device__ void add_field(const Fields<S>& in, const BackwardProblem<S>& g, const BackwardTile& tile,
                          Accumulate<S> (&grad_M)[kMicro][kVector]) {
  using T = Accumulate<S>;
  constexpr int kAcross = 16 * kBlock / Samples / kVector;
  // Rows that are loaded before the first of them is stored: for all the compiler knows, a later load may read a store.
  constexpr int kRows = Vector && sizeof(S) < sizeof(double) ? 2 : 1;
  const Layout& layout = OfR ? in.layout_R : in.layout_x;
  const T* weights = OfR ? g.weights_a : g.weights_b;
  S* into = OfR ? g.grad_R : g.grad_x;
  T sums[kMicro][kVector] = {};
  if (weights)
    add_products<S, Samples, Tensor, Vector>(in, OfR ? in.R : in.x, layout, weights, g.padded, tile, sums);
  const int thread = anew(threadIdx.x);
  const int64_t p = tile.first_pixel + thread % kAcross * kVector;
  const int64_t row = tile.first_row + thread / kAcross * kMicro;
#pragma unroll
  for (int first = 0; first < kMicro; first += kRows) {
    Packed<S> r[kRows], value[kRows];
    Packed<T> m[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t at = row + first + i < in.batch ? row + first + i : 0;
      const S* R = in.R + at * in.layout_R.batch + tile.channel * in.layout_R.channel;
      const S* x = in.x + at * in.layout_x.batch + tile.channel * in.layout_x.channel;
      r[i] = load_pixels<Vector>(R, in.layout_R.pixel, p, in.pixels);
      value[i] = load_pixels<Vector>(x, in.layout_x.pixel, p, in.pixels);
      m[i] = load_pixels<Vector>(in.M + at * in.pixels, 1, p, in.pixels);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t at = row + first + i;
      if (at >= in.batch) continue;
      const Cotangents<T> by(g.moments + at * kMoments);
      const Four<T> of_R = r[i].wide(), of_x = value[i].wide(), of_M = m[i].wide();
      Four<T> grad;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const T from_gram = sums[first + i][j];
        grad_M[first + i][j] += OfR ? by.of_R(of_R.v[j], of_x.v[j], of_M.v[j], from_gram, grad.v[j])
                                    : by.of_x(of_R.v[j], of_x.v[j], of_M.v[j], from_gram, grad.v[j]);
      }
      if (into)
        store_pixels<Vector>(grad, into + at * layout.batch + tile.channel * layout.channel, layout.pixel, p, in.pixels);
    }
  }
}

// A block has a tile of samples x pixels and a group of channels.
template <class S, int Samples, bool Tensor, bool Vector>
__global__ void __launch_bounds__(kBlock, sizeof(S) == sizeof(double) ? 1 : 2)
    statistics_backward_kernel(Fields<S> in, BackwardProblem<S> g) {
  using T = Accumulate<S>;
  constexpr int kPixels = 16 * kBlock / Samples, kAcross = kPixels / kVector;
  const int64_t row_tile = blockIdx.x % g.row_tiles, pixel_tile = blockIdx.x / g.row_tiles % g.pixel_tiles;
  const int64_t group = blockIdx.x / (g.row_tiles * g.pixel_tiles);
  BackwardTile tile{row_tile * Samples, pixel_tile * kPixels, static_cast<int>(group) * g.group_channels};
  const int last_channel = tile.channel + g.group_channels < in.channels ? tile.channel + g.group_channels : in.channels;

  T grad_M[kMicro][kVector] = {};
#pragma unroll 1
  for (; tile.channel < last_channel; ++tile.channel) {
    add_field<S, Samples, Tensor, Vector, true>(in, g, tile, grad_M);
    if (g.grad_x || g.grad_M) add_field<S, Samples, Tensor, Vector, false>(in, g, tile, grad_M);
  }
  if (!g.grad_M) return;
  const int64_t p = tile.first_pixel + threadIdx.x % kAcross * kVector;
  const int64_t row = tile.first_row + threadIdx.x / kAcross * kMicro;
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    if (row + i >= in.batch) continue;
    Four<T> values;
#pragma unroll
    for (int j = 0; j < kVector; ++j) values.v[j] = grad_M[i][j];
    store_pixels<Vector>(values, g.grad_M + (group * in.batch + row + i) * in.pixels, 1, p, in.pixels);
  }
}

constexpr int kChannelsAtOnce = 4;  // of a thread that are under way at once

// Without Grams: a thread has four pixels of a sample and a group of channels.
template <class S, bool Vector, bool OneField>
__global__ void __launch_bounds__(kBlock, sizeof(S) == sizeof(double) ? 1 : 2)
    moments_backward_kernel(Fields<S> in, BackwardProblem<S> g) {
  using T = Accumulate<S>;
  const int64_t fours = (in.pixels + kVector - 1) / kVector;
  const int64_t group = blockIdx.x / g.pixel_tiles;
  const int64_t item = blockIdx.x % g.pixel_tiles * kBlock + threadIdx.x, sample = item / fours, p = item % fours * kVector;
  if (sample >= in.batch) return;
  const int first_channel = static_cast<int>(group) * g.group_channels;
  const int last_channel = first_channel + g.group_channels < in.channels ? first_channel + g.group_channels : in.channels;
  const S *R = in.R + sample * in.layout_R.batch, *x = in.x + sample * in.layout_x.batch;
  const Four<T> m = load_pixels<Vector>(in.M + sample * in.pixels, 1, p, in.pixels).wide();
  const Cotangents<T> by(g.moments + sample * kMoments);

  Four<T> grad_M = none<T>();
  for (int start = first_channel; start < last_channel; start += kChannelsAtOnce) {
    Packed<S> r[kChannelsAtOnce], value[kChannelsAtOnce];
#pragma unroll
    for (int i = 0; i < kChannelsAtOnce; ++i) {
      const int c = start + i < last_channel ? start + i : start;
      r[i] = load_pixels<Vector>(R + c * in.layout_R.channel, in.layout_R.pixel, p, in.pixels);
      if (!OneField) value[i] = load_pixels<Vector>(x + c * in.layout_x.channel, in.layout_x.pixel, p, in.pixels);
    }
#pragma unroll
    for (int i = 0; i < kChannelsAtOnce; ++i) {
      if (start + i >= last_channel) break;
      const Four<T> of_R = r[i].wide(), of_x = OneField ? of_R : value[i].wide();
      Four<T> grad_R, grad_x;
#pragma unroll
      for (int j = 0; j < kVector; ++j)
        grad_M.v[j] += by.of_R(of_R.v[j], of_x.v[j], m.v[j], T(0), grad_R.v[j]) +
                       by.of_x(of_R.v[j], of_x.v[j], m.v[j], T(0), grad_x.v[j]);
      const int64_t at_R = sample * in.layout_R.batch + (start + i) * in.layout_R.channel;
      const int64_t at_x = sample * in.layout_x.batch + (start + i) * in.layout_x.channel;
      store_pixels<Vector>(grad_R, g.grad_R + at_R, in.layout_R.pixel, p, in.pixels);
      if (g.grad_x) store_pixels<Vector>(grad_x, g.grad_x + at_x, in.layout_x.pixel, p, in.pixels);
    }
  }
  if (g.grad_M) store_pixels<Vector>(grad_M, g.grad_M + (group * in.batch + sample) * in.pixels, 1, p, in.pixels);
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
  const bool one_field = R == x && layout_R.channel == layout_x.channel && layout_R.pixel == layout_x.pixel;
  return {R, x, M, layout_R, layout_x, batch, pixels, channels, vector, one_field};
}

// Calls f with each flag as a type.
template <class F>
void with_flag(bool flag, F f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

template <class S>
void launch_moments(const Fields<S>& in, const Device& device, Accumulate<S>* moments) {
  const MomentParts parts(in.pixels, in.channels);
  double* partials = device.array<double>(in.batch * parts.count() * kMoments);
  with_flag(in.vector, [&](auto vector) {
    with_flag(in.one_field, [&](auto one_field) {
      launch(device, moments_kernel<S, decltype(vector)::value, decltype(one_field)::value>, in.batch * parts.count(),
             kBlock, kMoments * kBlock / kWarp * sizeof(double), in, parts, partials);
    });
  });
  launch(device, finish_moments_kernel<Accumulate<S>>, in.batch, kMoments * kWarp, 0, partials, parts.count(), moments);
}

template <class S, int Tile, bool Tensor>
void launch_gram(const Rows<S>& rows, const Device& device, Accumulate<S>* gram) {
  using T = Accumulate<S>;
  const GramPlan plan(rows.batch, rows.elements, Tile, kDepth<Tile>, sizeof(T), device.multiprocessors);
  const int64_t values = plan.pairs * Tile * Tile;
  T* partials = device.array<T>(plan.splits * values);
  with_flag(rows.vector, [&](auto vector) {
    launch(device, gram_kernel<S, Tile, Tensor, decltype(vector)::value>, plan.splits * plan.pairs, kBlock,
           gram_shared_bytes<S, Tile, Tensor>(), rows, plan, partials);
  });
  launch(device, finish_gram_kernel<T>, values / kWarp, kBlock, kBlock * sizeof(double), partials, plan, Tile, rows.batch,
         gram, nullptr);
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

// Cotangents of Grams may be null, and so may x and M, whose gradients are then not wanted.
template <class S>
struct StatisticsGradients {
  using T = Accumulate<S>;
  const T *moments, *gram_R, *gram_x;
  S *R, *x;
  T* M;
};

// Calls run(problem, blocks) with a backward cut into tiles x groups of channels, which fill the device where the tiles
// alone do not.
template <class S, class F>
void in_groups(const Fields<S>& in, const StatisticsGradients<S>& grad, const Device& device, int64_t pixel_tiles,
               int64_t row_tiles, BackwardProblem<S> g, F run) {
  using T = Accumulate<S>;
  const int64_t tiles = pixel_tiles * row_tiles;
  int64_t groups = ceil_div(4 * device.multiprocessors, tiles);
  groups = groups < in.channels ? groups : in.channels;
  g.group_channels = static_cast<int>(ceil_div(in.channels, groups));
  groups = ceil_div(in.channels, g.group_channels);
  const int64_t count = in.batch * in.pixels;
  const bool partial = grad.M && groups > 1;
  g.grad_M = partial ? device.array<T>(groups * count) : grad.M;
  g.pixel_tiles = pixel_tiles;
  g.row_tiles = row_tiles;
  run(g, tiles * groups);
  if (partial)
    launch(device, add_groups_kernel<T>, ceil_div(count, kBlock), kBlock, 0, g.grad_M, groups, count, grad.M);
}

template <class S, int Samples, bool Tensor>
void launch_backward(const Fields<S>& in, const StatisticsGradients<S>& grad, const Device& device) {
  const int64_t padded = ceil_div(in.batch, kWeightsAlignment) * kWeightsAlignment;
  const int64_t row_tiles = ceil_div(in.batch, Samples), pixel_tiles = ceil_div(in.pixels, 16 * kBlock / Samples);
  const BackwardProblem<S> problem{grad.moments,
                                   launch_symmetrise(grad.gram_R, in.batch, padded, device),
                                   grad.x || grad.M ? launch_symmetrise(grad.gram_x, in.batch, padded, device) : nullptr,
                                   padded,
                                   grad.R,
                                   grad.x};
  in_groups(in, grad, device, pixel_tiles, row_tiles, problem, [&](const BackwardProblem<S>& g, int64_t blocks) {
    with_flag(in.vector, [&](auto vector) {
      launch(device, statistics_backward_kernel<S, Samples, Tensor, decltype(vector)::value>, blocks, kBlock,
             backward_shared_bytes<S, Samples, Tensor>(), in, g);
    });
  });
}

template <class S>
void launch_moments_backward(const Fields<S>& in, const StatisticsGradients<S>& grad, const Device& device) {
  const BackwardProblem<S> problem{grad.moments, nullptr, nullptr, 0, grad.R, grad.x};
  const int64_t tiles = ceil_div(in.batch * ceil_div(in.pixels, kVector), kBlock);
  in_groups(in, grad, device, tiles, 1, problem, [&](const BackwardProblem<S>& g, int64_t blocks) {
    with_flag(in.vector, [&](auto vector) {
      with_flag(in.one_field, [&](auto one_field) {
        launch(device, moments_backward_kernel<S, decltype(vector)::value, decltype(one_field)::value>, blocks, kBlock, 0,
               in, g);
      });
    });
  });
}

constexpr int64_t kBackwardBytes = 224 * 1024;  // of shared memory, that a block needs for the backward in one pass

// Of 65 to 128 samples, with cotangents of both Grams.
template <class S>
void launch_backward_in_one_pass(const Fields<S>& in, const StatisticsGradients<S>& grad, const Device& device);

template <class S>
void statistics_backward(Fields<S> in, const StatisticsGradients<S>& grad, const Device& device) {
  if (in.batch == 0) return;
  in.vector = in.vector && vectorisable(grad.R, in.pixels, sizeof(S)) && vectorisable(grad.x, in.pixels, sizeof(S)) &&
              vectorisable(grad.M, in.pixels, sizeof(Accumulate<S>));
  if (!grad.gram_R && !grad.gram_x) return launch_moments_backward(in, grad, device);
  if constexpr (!std::is_same_v<S, double>) {
    const bool in_one_pass = in.batch > 64 && in.batch <= 128 && in.vector && device.tensor_cores &&
                             device.shared_bytes >= kBackwardBytes;
    if (in_one_pass && grad.gram_R && grad.gram_x) return launch_backward_in_one_pass(in, grad, device);
  }
  with_tile<S>(in.batch, device, [&](auto samples, auto tensor) {
    launch_backward<S, decltype(samples)::value, decltype(tensor)::value>(in, grad, device);
  });
}

}  // namespace sib_ext::cuda

#include "statistics_in_one_pass.cuh"
