// Moments and both Grams of 65 to 128 samples in one read of R, x and M: a block takes all samples over a split of
// their elements, sixteen at a time. Twelve warps form the lower triangles of both Grams, 64 x 32 values each; eight of
// them split a and b into TF32 numbers, once, on the way into shared memory, and sum the moments.
#pragma once

#include "masked_statistics_kernels.cuh"

namespace sib_ext::cuda {

constexpr int kPassRows = 128, kPassTile = 64, kPassDepth = 16;
constexpr int kPassWarps = 12, kPassBlock = kPassWarps * kWarp;
constexpr int kPassFirstLoader = kPassBlock - 2 * kPassRows;  // a thread; from here on two a row
constexpr int kPassItems = kPassDepth / kTensorRows;          // of four elements that a thread loads at a time
constexpr int kPassSum = 8;  // steps whose moments are summed in float: 64 elements a thread

// How eight elements of the rows lie in shared memory: by sixteen rows, first their high parts, then their low ones,
// both as the lanes of a warp take them: lane l holds two elements of the rows l / 4 and l / 4 + 8, in the order of
// mma's left operand. Which two elements is the same for all rows: a sum of products asks for no more.
constexpr int kPassQuad = 4, kPassPart = kWarp * kPassQuad;  // numbers of a lane; of a warp
constexpr int kPassSixteen = 2 * kPassPart;
constexpr int kPassEight = kPassRows / 16 * kPassSixteen;
constexpr int kPassField = kPassItems * kPassEight;
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
  // left and right point at this lane's part of the rows. Column: where among the 64 rows the 32 columns begin, if they
  // are some of them; then what is above the diagonal is left out, and right is not read. Else: -1.
  template <int Column>
  __device__ void add(const float* left, const float* right) {
    constexpr bool kDiagonal = Column >= 0;
    constexpr int kFirst = kDiagonal ? Column / 16 : 0;
    __syncwarp();  // the lanes may have parted where they stored
    uint32_t high_a[4][4], low_a[4][4];
#pragma unroll
    for (int m = kFirst; m < 4; ++m) load(left + m * kPassSixteen, high_a[m], low_a[m]);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t high_b[4], low_b[4];
      if constexpr (kDiagonal) {
        memcpy(high_b, high_a[kFirst + pair], sizeof high_b);
        memcpy(low_b, low_a[kFirst + pair], sizeof low_b);
      } else {
        load(right + pair * kPassSixteen, high_b, low_b);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t high[2] = {settled(high_b[n]), settled(high_b[n + 2])};
        const uint32_t low[2] = {settled(low_b[n]), settled(low_b[n + 2])};
#pragma unroll
        for (int m = kDiagonal ? kFirst + pair : 0; m < 4; ++m) {
          float eight[4] = {};
          multiply_add_tf32(eight, low_a[m], high);
          multiply_add_tf32(eight, high_a[m], low);
          multiply_add_tf32(eight, high_a[m], high);
#pragma unroll
          for (int i = 0; i < 4; ++i) sums_[m][pair * 2 + n][i] += eight[i];
        }
      }
    }
  }

  __device__ void store(float* out) const {
    const int row = threadIdx.x % kWarp / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          out[(m * 16 + i / 2 * 8 + row) * kPassTile + n * 8 + column + i % 2] = sums_[m][n][i];
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

// Elements of R and x of one row on their way from memory to shared memory, and the row's moments.
template <class S>
class PassLoader {
 public:
  __device__ explicit PassLoader(int64_t begin) : element_(static_cast<uint32_t>(begin) + side() * kVector) {}

  __device__ void clear() const {
    if (side() != 0) return;
    for (int i = 0; i < kMoments; ++i) total(i) = 0;
  }

  // The next step's; zeros from the end on and beyond the batch.
  __device__ void load(const Fields<S>& in, uint32_t end) {
    const int64_t row = this->row();
#pragma unroll
    for (int item = 0; item < kPassItems; ++item) {
      const uint32_t element = element_ + item * kTensorRows;
      r_[item] = x_[item] = Four<S>{};
      m_[item] = Four<float>{};
      if (row < in.batch && element < end) {
        r_[item] = *reinterpret_cast<const Four<S>*>(in.R + row * in.layout_R.batch + element);
        x_[item] = *reinterpret_cast<const Four<S>*>(in.x + row * in.layout_x.batch + element);
        m_[item] = *reinterpret_cast<const Four<float>*>(in.M + row * in.pixels +
                                                         element % static_cast<uint32_t>(in.pixels));
      }
    }
    element_ += kPassDepth;
  }

  // a and b of what was loaded, split; and their moments. The second thread of a row turns its pairs around.
  __device__ void store(float* fields) {
    const int row = this->row(), turned = side();
#pragma unroll
    for (int item = 0; item < kPassItems; ++item) {
      float* at = fields + item * kPassEight + row / 16 * kPassSixteen + row / 8 % 2;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float r = widen(r_[item].v[i]), x = widen(x_[item].v[i]), m = m_[item].v[i];
        add_moments(r, x, m, sums_);
        float* to = at + pass_quad(row % 8, side() * 2 + i / 2) + (i % 2 ^ turned) * 2;
        part(r * m, to);
        part(x * m, to + kPassField);
      }
    }
  }

  // The float sums of the row's two threads go to the first one's totals.
  __device__ void sum() {
#pragma unroll
    for (int i = 0; i < kMoments; ++i) {
      const float of_row = sums_[i] + __shfl_down_sync(kAllLanes, sums_[i], 1);
      if (side() == 0) total(i) += of_row;
      sums_[i] = 0;
    }
  }

  // partials[sample][split]
  __device__ void finish(int64_t batch, int64_t splits, int64_t split, double* partials) const {
    if (side() != 0 || row() >= batch) return;
    for (int i = 0; i < kMoments; ++i) partials[(row() * splits + split) * kMoments + i] = total(i);
  }

 private:
  __device__ static int row() { return (threadIdx.x - kPassFirstLoader) / 2; }
  __device__ static int side() { return threadIdx.x % 2; }
  __device__ static double& total(int moment) {
    return reinterpret_cast<double*>(block_memory() + kPassOperands)[moment * kPassRows + row()];
  }
  __device__ static void part(float v, float* to) {
    uint32_t high, low;
    split(v, high, low);
    to[0] = as_float(high);
    to[kPassPart] = as_float(low);
  }

  uint32_t element_;
  Four<S> r_[kPassItems], x_[kPassItems];
  Four<float> m_[kPassItems];
  float sums_[kMoments] = {};
};

// moments[sample][split] and grams[field][split][pair]; a block takes a split.
template <class S>
__global__ void __launch_bounds__(kPassBlock, 1)
    statistics_in_one_pass_kernel(Fields<S> in, GramPlan plan, double* moments, float* grams) {
  const int64_t split = blockIdx.x, elements = in.channels * in.pixels, begin = split * plan.split_elements;
  const int64_t end = begin + plan.split_elements < elements ? begin + plan.split_elements : elements;
  const int steps = static_cast<int>((end - begin + kPassDepth - 1) / kPassDepth);
  // Of each field four warps have the lower left tile's halves and the left and the right halves of the diagonal tiles:
  // 16, 14 and 6 of the 36 products of a multiprocessor's quarter, which takes every fourth warp.
  const int warp = threadIdx.x / kWarp, field = warp % 2, which = warp / 2 % 2, kind = warp / 4;
  const int row = kind == 0 ? 1 : which, half = kind == 0 ? which : row * 2 + (kind == 2);  // of 64 rows; of 32 columns
  const bool loads = kind > 0;
  float* memory = reinterpret_cast<float*>(block_memory());  // [2][field][eight]
  const int mine = field * kPassField + pass_quad(threadIdx.x % kWarp / 4, threadIdx.x % 4);
  const int left = mine + row * 4 * kPassSixteen, right = mine + half * 2 * kPassSixteen;

  PassTile product;
  PassLoader<S> loader(begin);
  if (loads) {
    loader.clear();
    loader.load(in, end);
    loader.store(memory);
    loader.load(in, end);
  }
  __syncthreads();
  // In each step one half of the loading warps stores the next step's operands and then multiplies, the other half
  // multiplies first: so tensor cores and ordinary arithmetic work at the same time.
#pragma unroll 1
  for (int phase = 0; phase < 2 * steps; ++phase) {
    const int step = phase / 2;
    if (phase % 2 == kind % 2) {
      if (loads) {
        loader.store(memory + (step + 1) % 2 * (2 * kPassField));
        loader.load(in, end);
        if (step % kPassSum == kPassSum - 1) loader.sum();
      }
    } else {
      const float* operands = memory + step % 2 * (2 * kPassField);
#pragma unroll
      for (int eight = 0; eight < kPassField; eight += kPassEight) {
        if (kind == 0) product.add<-1>(operands + left + eight, operands + right + eight);
        if (kind == 1) product.add<0>(operands + left + eight, nullptr);
        if (kind == 2) product.add<32>(operands + left + eight, nullptr);
      }
    }
    if (phase % 2 == 1) __syncthreads();
  }
  if (loads) {
    loader.sum();
    loader.finish(in.batch, plan.splits, split, moments);
  }
  const int64_t pair = row * (row + 1) / 2 + half / 2;
  float* tile = grams + ((field * plan.splits + split) * plan.pairs + pair) * (kPassTile * kPassTile);
  product.store(tile + half % 2 * 32);
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
  for (float* gram : {gram_R, gram_x}) {
    launch(device, finish_gram_kernel<float>, values / kWarp, kBlock, kBlock * sizeof(double), gram_partials, plan,
           kPassTile, in.batch, gram);
    gram_partials += plan.splits * values;
  }
}

}  // namespace sib_ext::cuda
