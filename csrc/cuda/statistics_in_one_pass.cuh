// Moments and both Grams of 65 to 128 samples in one read of R, x and M: a block takes all samples over a split of
// their elements, sixteen at a time. Twelve warps form the lower triangles of both Grams, 64 x 32 values each; four more
// split a and b into TF32 numbers, once, on the way into shared memory, and sum the moments.
#pragma once

#include "masked_statistics_kernels.cuh"

namespace sib_ext::cuda {

constexpr int kPassRows = 128, kPassTile = 64, kPassDepth = 16;
constexpr int kPassFirstLoader = 12 * kWarp, kPassBlock = 16 * kWarp;  // threads
constexpr int kPassLoaderRows = 2;                            // of a pair of loading threads
constexpr int kPassItems = kPassDepth / kTensorRows;          // of four elements that a thread loads at a time
constexpr int kPassSum = 8;  // steps whose moments are summed in float: 64 elements a thread

// How eight elements of the rows lie in shared memory: by sixteen rows, first their high parts, then their low ones,
// both as the lanes of a warp take them: lane l holds two elements of the rows l / 4 and l / 4 + 8, in the order of
// mma's left operand. Which two elements is the same for all rows: a sum of products asks for no more.
constexpr int kPassQuad = 4, kPassPart = kWarp * kPassQuad;  // numbers of a lane; of a warp
constexpr int kPassSixteen = 2 * kPassPart;
constexpr int kPassEight = kPassRows / 16 * kPassSixteen;
constexpr int kPassField = kPassItems * kPassEight;
static_assert(kPassItems == 2);
constexpr int64_t kPassOperands = 2 * 2 * kPassField * sizeof(float);  // of two steps
constexpr int64_t kPassBytes = kPassOperands + kMoments * kPassRows * sizeof(double);
static_assert(kPassBytes <= 99 * 1024, "what every GPU that multiplies TF32 gives a block");

// Where the pair-th two of eight elements of row g are: turned about by the row, so that stores, too, meet all banks.
__device__ inline int pass_quad(int g, int pair) { return (g * 4 + (pair ^ g / 2)) * kPassQuad; }

// A split a multiprocessor; several where sums in float would be long, if there is the memory.
inline GramPlan pass_plan(int64_t batch, int64_t elements, int multiprocessors) {
  GramPlan plan(batch, elements, kPassTile, kPassDepth, sizeof(float), multiprocessors);
  const int64_t split_bytes = plan.pairs * kPassTile * kPassTile * sizeof(float);
  const int64_t affordable = (int64_t(64) << 20) / (split_bytes * multiprocessors);
  int64_t rounds = ceil_div(elements, int64_t(8192) * multiprocessors);
  rounds = rounds < affordable ? rounds : affordable;
  const int64_t wanted = (rounds < 1 ? 1 : rounds) * multiprocessors;
  plan.split_elements = ceil_div(ceil_div(elements, kPassDepth), wanted) * kPassDepth;
  plan.splits = ceil_div(elements, plan.split_elements);
  return plan;
}

// A warp's 64 x 32 values of left right^T.
class PassTile {
 public:
  // left and right point at this lane's part of the rows. First: at which of the four sixteens of rows the 32 columns begin,
  // if they are some of these rows; then what is above the diagonal is left out. Else -2: all of it is below.
  template <int First>
  __device__ void add(const float* left, const float* right) {
    __syncwarp();  // the lanes may have parted where they stored
    uint32_t high[4][2], low[4][2];
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t high_b[4], low_b[4];
      load(right + pair * kPassSixteen, high_b, low_b);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        high[pair * 2 + i % 2][i / 2] = settled(high_b[i]);
        low[pair * 2 + i % 2][i / 2] = settled(low_b[i]);
      }
    }
#pragma unroll
    for (int m = First < 0 ? 0 : First; m < 4; ++m) {
      uint32_t high_a[4], low_a[4];
      load(left + m * kPassSixteen, high_a, low_a);
      // Tiles side by side, none of which waits for another.
      const int tiles = 2 * (m - First + 1) < 4 ? 2 * (m - First + 1) : 4;
      float eight[4][4] = {};
#pragma unroll
      for (int n = 0; n < tiles; ++n) multiply_add_tf32(eight[n], low_a, high[n]);
#pragma unroll
      for (int n = 0; n < tiles; ++n) multiply_add_tf32(eight[n], high_a, low[n]);
#pragma unroll
      for (int n = 0; n < tiles; ++n) multiply_add_tf32(eight[n], high_a, high[n]);
#pragma unroll
      for (int n = 0; n < tiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[m][n][i] += eight[n][i];
    }
  }

  __device__ void store(float* out) const {
    const int row = threadIdx.x % kWarp / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint2 two;
          memcpy(&two, sums_[m][n] + i * 2, sizeof two);
          __stcg(reinterpret_cast<uint2*>(out + (m * 16 + i * 8 + row) * kPassTile + n * 8 + column), two);
        }
  }

 private:
  __device__ static void load(const float* sixteen, uint32_t (&high)[4], uint32_t (&low)[4]) {
    const Four<float> highs = *reinterpret_cast<const Four<float>*>(sixteen);
    const Four<float> lows = *reinterpret_cast<const Four<float>*>(sixteen + kPassPart);
    memcpy(high, &highs, sizeof high);
    memcpy(low, &lows, sizeof low);
  }

  // The same number. Pairs that were only moved together, the compiler moves once more for every product.
  __device__ static uint32_t settled(uint32_t v) {
    const float same = as_float(v) + 0.0f;
    memcpy(&v, &same, sizeof v);
    return v;
  }

  float sums_[4][4][4] = {};
};

// Elements of R and x of two rows, 64 apart, on their way from memory to shared memory, and the rows' moments.
template <class S>
class PassLoader {
 public:
  __device__ PassLoader(const Fields<S>& in, uint32_t begin)
      : element_(begin + side() * kVector),
        pixel_(element_ % static_cast<uint32_t>(in.pixels)) {
    if (side() != 0) return;
    for (int i = 0; i < kPassLoaderRows; ++i)
      for (int moment = 0; moment < kMoments; ++moment) total(i, moment) = 0;
  }

  // The next step's; zeros from the end on and beyond the batch.
  __device__ void load(const Fields<S>& in, uint32_t end) {
#pragma unroll
    for (int item = 0; item < kPassItems; ++item) {
#pragma unroll
      for (int i = 0; i < kPassLoaderRows; ++i) {
        const int64_t row = this->row(i);
        values_[i][item] = {};
        if (row < in.batch && element_ < end) {
          values_[i][item] = {load_packed(in.R + row * in.layout_R.batch + element_),
                              load_packed(in.x + row * in.layout_x.batch + element_),
                              load_packed(in.M + row * in.pixels + pixel_)};
        }
      }
      element_ += kTensorRows;
      pixel_ += kTensorRows;
      while (pixel_ >= in.pixels) pixel_ -= static_cast<uint32_t>(in.pixels);
    }
  }

  // a and b of what was loaded, split; and their moments. The second thread of a row turns its pairs around.
  __device__ void store(float* fields) {
    const int turned = side();
#pragma unroll
    for (int i = 0; i < kPassLoaderRows; ++i) {
      const int row = this->row(i);
#pragma unroll
      for (int item = 0; item < kPassItems; ++item) {
        const Four<float> of_R = values_[i][item].R.wide(), of_x = values_[i][item].x.wide();
        const Four<float> of_M = values_[i][item].M.wide();
        float* at = fields + item * kPassEight + row / 16 * kPassSixteen + row / 8 % 2;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const float r = of_R.v[j], x = of_x.v[j], m = of_M.v[j];
          add_moments(r, x, m, sums_[i]);
          float* to = at + pass_quad(row % 8, side() * 2 + j / 2) + (j % 2 ^ turned) * 2;
          part(r * m, to);
          part(x * m, to + kPassField);
        }
      }
    }
  }

  // The float sums of a row's two threads go to the first one's totals.
  __device__ void sum() {
#pragma unroll
    for (int i = 0; i < kPassLoaderRows; ++i)
#pragma unroll
      for (int moment = 0; moment < kMoments; ++moment) {
        const float of_row = sums_[i][moment] + __shfl_down_sync(kAllLanes, sums_[i][moment], 1);
        if (side() == 0) total(i, moment) += of_row;
        sums_[i][moment] = 0;
      }
  }

  // partials[sample][split]
  __device__ void finish(int64_t batch, int64_t splits, int64_t split, double* partials) const {
    for (int i = 0; i < kPassLoaderRows; ++i) {
      if (side() != 0 || row(i) >= batch) continue;
      for (int moment = 0; moment < kMoments; ++moment)
        partials[(row(i) * splits + split) * kMoments + moment] = total(i, moment);
    }
  }

 private:
  struct Values {
    Packed<S> R, x;
    Packed<float> M;
  };

  __device__ static int row(int i) { return static_cast<int>(threadIdx.x - kPassFirstLoader) / 2 + i * (kPassRows / 2); }
  __device__ static int side() { return threadIdx.x % 2; }
  __device__ static double& total(int i, int moment) {
    return reinterpret_cast<double*>(block_memory() + kPassOperands)[moment * kPassRows + row(i)];
  }
  __device__ static void part(float v, float* to) {
    uint32_t high, low;
    split(v, high, low);
    to[0] = as_float(high);
    to[kPassPart] = as_float(low);
  }

  uint32_t element_, pixel_;
  Values values_[kPassLoaderRows][kPassItems];
  float sums_[kPassLoaderRows][kMoments] = {};
};

// What a warp forms. Of each field four warps have the lower left tile's halves and the left and the right halves of the
// diagonal tiles: 16, 14 and 6 of the 36 products of a multiprocessor's quarter, which takes every fourth warp.
struct PassPart {
  int field, kind, row, half;  // row: of 64 rows; half: of 32 columns

  __device__ explicit PassPart(unsigned warp)
      : field(warp % 2),
        kind(warp / 4),
        row(kind == 0 ? 1 : warp / 2 % 2),
        half(kind == 0 ? warp / 2 % 2 : row * 2 + (kind == 2)) {}
};

// moments[sample][split] and grams[field][split][pair]; a block takes a split.
template <class S>
__global__ void __launch_bounds__(kPassBlock, 1)
    statistics_in_one_pass_kernel(Fields<S> in, GramPlan plan, double* moments, float* grams) {
  const int64_t split = blockIdx.x;
  const uint32_t elements = static_cast<uint32_t>(in.channels * in.pixels);
  const uint32_t most = static_cast<uint32_t>(plan.split_elements);
  const uint32_t begin = blockIdx.x * most, end = elements - begin < most ? elements : begin + most;
  const int steps = static_cast<int>((end - begin + kPassDepth - 1) / kPassDepth);
  float* memory = reinterpret_cast<float*>(block_memory());  // [2][field][eight]
  if (threadIdx.x >= kPassFirstLoader) {
    PassLoader<S> loader(in, begin);
    loader.load(in, end);
#pragma unroll 1
    for (int step = steps; step >= 0; --step) {  // one ahead of the products
      loader.store(memory + step % 2 * (2 * kPassField));
      loader.load(in, end);
      if (step % kPassSum == 0) loader.sum();
      __syncthreads();
    }
    loader.finish(in.batch, plan.splits, split, moments);
    return;
  }
  const PassPart part(threadIdx.x / kWarp);
  // This lane's places in both operands, of which the bits for the buffer and the eight are turned as the loop goes on: in
  // one register, because two spill.
  constexpr unsigned kBoth = 1u << 16;
  static_assert(kPassOperands <= kBoth * static_cast<int64_t>(sizeof(float)));
  const unsigned mine = (steps % 2 * 2 + part.field) * kPassField + pass_quad(threadIdx.x % kWarp / 4, threadIdx.x % 4);
  unsigned places = mine + part.row * 4 * kPassSixteen + (mine + part.half * 2 * kPassSixteen) * kBoth;
  PassTile product;
  __syncthreads();
#pragma unroll 1
  for (unsigned eight = kPassItems * steps; eight > 0; --eight) {
    const float *left = memory + places % kBoth, *right = memory + places / kBoth;
    if (part.kind == 0) product.add<-2>(left, right);
    if (part.kind == 1) product.add<0>(left, right);
    if (part.kind == 2) product.add<2>(left, right);
    places ^= (eight % 2 == 1 ? kPassEight + 2 * kPassField : kPassEight) * (1 + kBoth);
    if (eight % 2 == 1) __syncthreads();
  }
  const PassPart done(static_cast<unsigned>(anew(threadIdx.x)) / kWarp);
  const int64_t pair = done.row * (done.row + 1) / 2 + done.half / 2;
  float* tile = grams + ((done.field * plan.splits + split) * plan.pairs + pair) * (kPassTile * kPassTile);
  product.store(tile + done.half % 2 * 32);
}

template <class S>
void launch_in_one_pass(const Fields<S>& in, const Device& device, float* moments, float* gram_R, float* gram_x) {
  const GramPlan plan = pass_plan(in.batch, in.channels * in.pixels, device.multiprocessors);
  const int64_t values = plan.pairs * kPassTile * kPassTile;
  double* moment_partials = device.array<double>(in.batch * plan.splits * kMoments);
  float* gram_partials = device.array<float>(2 * plan.splits * values);
  launch(device, statistics_in_one_pass_kernel<S>, plan.splits, kPassBlock, kPassBytes, in, plan, moment_partials,
         gram_partials);
  launch(device, finish_moments_kernel<float>, in.batch, kMoments * kWarp, 0, moment_partials, plan.splits, moments);
  launch(device, finish_gram_kernel<float>, 2 * values / kWarp, kBlock, kBlock * sizeof(double), gram_partials, plan,
         kPassTile, in.batch, gram_R, gram_x);
}

// ---------------------------------------------------------------------------------------------- backward

// Both G + G^T of 65 to 128 samples stay in a block's shared memory. Each of its three groups of four warps takes tiles of
// all samples x 32 pixels and goes through their channels: for R, then for x, a (or b) is split into TF32 numbers on the
// way into shared memory, a warp forms 32 x 32 values of the product and works on in the order in which it holds them.
// Groups wait for no other group, so that one multiplies while another loads or stores.
constexpr int kBackwardGroups = 3, kBackwardThreads = 4 * kWarp;  // of a group
constexpr int kBackwardBlock = kBackwardGroups * kBackwardThreads;
constexpr int kBackwardPixels = 32, kEights = kPassRows / kTensorRows;
constexpr int kBackwardWeights = kPassRows * kPassRows;          // numbers of a field
constexpr int kBackwardValues = 2 * kPassRows * kBackwardPixels;  // numbers of a group, high and low
static_assert((2 * kBackwardWeights + kBackwardGroups * kBackwardValues) * sizeof(float) == kBackwardBytes);

#ifdef SIB_CUDA_EMULATION
using ::emulation::group_sync;
inline void prefetch(const void*) {}
#else
// A barrier for the threads of one group; number 0 is the block's.
__device__ inline void group_sync(int group, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "r"(threads) : "memory");
}
// Into L2.
__device__ inline void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
#endif

// G + G^T: by eight columns, then by sixteen rows, as the lanes of a warp take them for mma's left operand; zeros beyond
// the batch.
__device__ inline void load_weights(const float* G, int batch, float* weights) {
#pragma unroll 4
  for (int quad = threadIdx.x; quad < kBackwardWeights / kVector; quad += kBackwardBlock) {
    const int lane = quad % kWarp, sixteen = quad / kWarp % (kPassRows / 16), eight = quad / kWarp / (kPassRows / 16);
    Four<float> four;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int row = sixteen * 16 + i % 2 * 8 + lane / 4, column = eight * 8 + i / 2 * 4 + lane % 4;
      four.v[i] = row < batch && column < batch ? G[row * batch + column] + G[column * batch + row] : 0.0f;
    }
    *reinterpret_cast<Four<float>*>(weights + quad * kVector) = four;
  }
}

// How the values of a tile lie in shared memory: by eight samples, then by eight pixels, for each lane of a warp
// mma's right operand, its high and its low parts. Pixels are dealt out so that of a product's row a lane holds the
// pixels 4 * (lane % 4) + {0, 1, 2, 3} of each half of the tile. The lanes' places are turned about so that loads and
// stores meet all banks. Fours: of pixels; 0 to 7.
template <class S>
class TileLoader {
 public:
  // The thread-th of a group loads four pixels of some pairs of samples, four samples apart.
  __device__ explicit TileLoader(int thread) : first_(thread / kWarp * 8 + thread % kWarp / 8), four_(thread % 8) {}

  __device__ void load(const Fields<S>& in, const S* field, int64_t stride, int64_t first_pixel) {
    const int64_t p = first_pixel + four_ * kVector;
    const S* line = field + first_ * stride + p;
    const float* line_M = in.M + first_ * in.pixels + p;
    const int rows = p < in.pixels ? static_cast<int>(in.batch) : 0;  // this thread's
#pragma unroll
    for (int row = 0; row < kPassRows; row += 32)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Masked<S>& four = values_[row / 32][i];
        four = {};
        if (first_ + row + i * 4 < rows) {
          four.value = load_packed(line);
          four.m = load_packed(line_M);
        }
        line += stride * (i == 0 ? 4 : 28);
        line_M += in.pixels * (i == 0 ? 4 : 28);
      }
  }

  __device__ void store(float* values) const {
    const int eight = first_ / 8, half = four_ / 4;
    const int lane = (four_ % 4 * 8 + first_ % 4) ^ four_;  // of the first pixel's column, turned about
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const Four<float> first = values_[item][0].product(), second = values_[item][1].product();
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const int quad = ((eight + item * 4) * 4 + half * 2 + j / 2) * kWarp + (lane ^ j % 2 * 4);
        uint32_t parts[4];
        split(first.v[j], parts[0], parts[2]);
        split(second.v[j], parts[1], parts[3]);
        Four<float> four;
        memcpy(four.v, parts, sizeof parts);
        *reinterpret_cast<Four<float>*>(values + quad * 4) = four;
      }
    }
  }

 private:
  static constexpr int kItems = kPassRows / 32;
  Masked<S> values_[kItems][2];
  int first_, four_;
};

template <class F>
__device__ void for_tiles(F f) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < 2; ++n) f(m, n);
}

// A warp's 32 x 32 values of the weights times the values: [sixteen rows][eight columns], as mma holds them.
__device__ inline void multiply(const float* weights, const float* values, float (&sums)[2][4][4]) {
  const int lane = anew(threadIdx.x) % kWarp;
  const float* left = weights + lane * 4;
  const float* right[2] = {values + (lane ^ lane / 8) * 4, values + (lane ^ lane / 8 ^ 4) * 4};
  __syncwarp();  // the lanes may have parted where they stored
#pragma unroll 1  // two at once spill
  for (int eight = 0; eight < kEights; ++eight) {
    uint32_t high_a[2][4], low_a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const Four<float> four = load_four(left + (eight * (kPassRows / 16) + m) * (kWarp * 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) split(four.v[i], high_a[m][i], low_a[m][i]);
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t high[2][2], low[2][2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const Four<float> four = load_four(right[pair] + (eight * 4 + pair * 2 + n) * (kWarp * 4));
        memcpy(high[n], four.v, sizeof high[n]);
        memcpy(low[n], four.v + 2, sizeof low[n]);
      }
      // Four tiles side by side, none of which waits for another.
      float of_eight[2][2][4] = {};
      for_tiles([&](int m, int n) { multiply_add_tf32(of_eight[m][n], low_a[m], high[n]); });
      for_tiles([&](int m, int n) { multiply_add_tf32(of_eight[m][n], high_a[m], low[n]); });
      for_tiles([&](int m, int n) { multiply_add_tf32(of_eight[m][n], high_a[m], high[n]); });
      for_tiles([&](int m, int n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][pair * 2 + n][i] += of_eight[m][n][i];
      });
    }
  }
}

// A lane's part of a tile: every eighth row of 32 from the first on, and four pixels of each half.
__device__ inline BackwardTile of_lane(int64_t first_pixel, int channel) {
  const int thread = anew(threadIdx.x) % kBackwardThreads;
  return {thread / kWarp * 32 + thread % kWarp / 4, first_pixel + thread % 4 * kVector, channel};
}

// One field's gradient from what the Gram says, in a lane's part of a tile, and its part of dL/dM.
template <class S, bool OfR>
__device__ void add_gradient(const Fields<S>& in, const BackwardProblem<S>& g, const BackwardTile& tile,
                             const float (&from_gram)[2][4][4], float (&grad_M)[4][2][kVector]) {
  const Layout& layout = OfR ? in.layout_R : in.layout_x;
  S* into = OfR ? g.grad_R : g.grad_x;
  const int64_t at_R = tile.first_row * in.layout_R.batch + tile.channel * in.layout_R.channel + tile.first_pixel;
  const int64_t at_x = tile.first_row * in.layout_x.batch + tile.channel * in.layout_x.channel + tile.first_pixel;
  const S *R = in.R + at_R, *x = in.x + at_x;
  const float* M = in.M + tile.first_row * in.pixels + tile.first_pixel;
  const float* moments = g.moments + tile.first_row * kMoments;
  S* out = (into ? into : g.grad_R) + (OfR ? at_R : at_x);  // is not stored to where it is not wanted
  int rows[2];  // of each half
#pragma unroll
  for (int half = 0; half < 2; ++half)
    rows[half] = tile.first_pixel + half * 16 < in.pixels ? static_cast<int>(in.batch - tile.first_row) : 0;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    // Loaded before the first of them is stored, as above.
    Packed<S> r[2][2], v[2][2];
    Packed<float> mask[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (m * 16 + i * 8 >= rows[half]) continue;
        r[i][half] = load_packed(R + half * 16);
        v[i][half] = load_packed(x + half * 16);
        mask[i][half] = load_packed(M + half * 16);
      }
      R += 8 * in.layout_R.batch;
      x += 8 * in.layout_x.batch;
      M += 8 * in.pixels;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (m * 16 + i * 8 >= rows[0]) break;
      const Cotangents<float> by(moments + (m * 16 + i * 8) * kMoments);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Four<float> of_R = r[i][half].wide(), of_x = v[i][half].wide(), of_M = mask[i][half].wide();
        Four<float> grad;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const float gram = from_gram[m][half * 2 + j / 2][i * 2 + j % 2];
          grad_M[m * 2 + i][half][j] += OfR ? by.of_R(of_R.v[j], of_x.v[j], of_M.v[j], gram, grad.v[j])
                                            : by.of_x(of_R.v[j], of_x.v[j], of_M.v[j], gram, grad.v[j]);
        }
        if (into && rows[half] > 0) store_pixels<true>(grad, out, 1, half * 16, 32);
      }
      out += 8 * layout.batch;
    }
  }
}

// Items: tiles of pixels, times groups of channels.
template <class S>
__global__ void __launch_bounds__(kBackwardBlock, 1)
    backward_in_one_pass_kernel(Fields<S> in, BackwardProblem<S> g, int items) {
  float* weights = reinterpret_cast<float*>(block_memory());  // [field][kBackwardWeights]
  load_weights(g.weights_a, static_cast<int>(in.batch), weights);
  load_weights(g.weights_b, static_cast<int>(in.batch), weights + kBackwardWeights);
  __syncthreads();
  const int group = threadIdx.x / kBackwardThreads;
  float* values = weights + 2 * kBackwardWeights + group * kBackwardValues;
  const bool both = g.grad_x || g.grad_M;
#pragma unroll 1
  for (int item = group * gridDim.x + blockIdx.x; item < items; item += kBackwardGroups * gridDim.x) {
    const int tiles = static_cast<int>(g.pixel_tiles), channels = item / tiles;
    const uint32_t first_pixel = static_cast<uint32_t>(item % tiles) * kBackwardPixels;
    const int first_channel = channels * g.group_channels, rest = in.channels - first_channel;
    const int last_channel = rest < g.group_channels ? in.channels : first_channel + g.group_channels;
    float grad_M[4][2][kVector] = {};
#pragma unroll 1
    for (int channel = first_channel, of_R = 1; channel < last_channel; channel += of_R) {  // x after R
      const int64_t stride = of_R ? in.layout_R.batch : in.layout_x.batch;
      const int64_t at = channel * (of_R ? in.layout_R.channel : in.layout_x.channel);
      const int thread = anew(threadIdx.x) % kBackwardThreads;
      TileLoader<S> loader(thread);
      loader.load(in, (of_R ? in.R : in.x) + at, stride, first_pixel);
      // What is read next from memory for the first time, a line a thread: x, then R of the next channel.
      const int64_t next = of_R ? thread * in.layout_x.batch + channel * in.layout_x.channel
                                : thread * in.layout_R.batch + (channel + 1) * in.layout_R.channel;
      if (thread < in.batch && channel + !of_R < last_channel) prefetch((of_R ? in.x : in.R) + next + first_pixel);
      group_sync(group, kBackwardThreads);  // all have multiplied what was there before
      loader.store(values);
      group_sync(group, kBackwardThreads);
      float sums[2][4][4] = {};
      multiply(weights + (of_R ? 0 : kBackwardWeights) + thread / kWarp * (2 * kWarp * 4), values, sums);
      const BackwardTile tile = of_lane(first_pixel, channel);
      of_R ? add_gradient<S, true>(in, g, tile, sums, grad_M) : add_gradient<S, false>(in, g, tile, sums, grad_M);
      of_R = !of_R || !both;
    }
    if (!g.grad_M) continue;
    const BackwardTile tile = of_lane(first_pixel, 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = tile.first_row + i * 8;
      if (row >= in.batch) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Four<float> of_M;
#pragma unroll
        for (int j = 0; j < kVector; ++j) of_M.v[j] = grad_M[i][half][j];
        store_pixels<true>(of_M, g.grad_M + (channels * in.batch + row) * in.pixels, 1, tile.first_pixel + half * 16,
                           in.pixels);
      }
    }
  }
}

template <class S>
void launch_backward_in_one_pass(const Fields<S>& in, const StatisticsGradients<S>& grad, const Device& device) {
  const BackwardProblem<S> problem{grad.moments, grad.gram_R, grad.gram_x, in.batch, grad.R, grad.x};
  in_groups(in, grad, device, ceil_div(in.pixels, kBackwardPixels), 1, problem,
            [&](const BackwardProblem<S>& g, int64_t items) {
              const int64_t wanted = ceil_div(items, kBackwardGroups);
              const int64_t blocks = wanted < device.multiprocessors ? wanted : device.multiprocessors;
              launch(device, backward_in_one_pass_kernel<S>, blocks, kBackwardBlock, kBackwardBytes, in, g,
                     static_cast<int>(items));
            });
}

}  // namespace sib_ext::cuda
