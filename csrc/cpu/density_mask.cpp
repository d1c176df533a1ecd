// density_mask on the CPU: one sample a task; two planes of the image as workspace, quantiles by selection.
//
// Published formula (sib_ext/reference.py: density_mask):
//   g = |mean_c R|, n = (g - q05)/(q95 - q05 + eps), h = sigmoid(slope (n - q80(n))),
//   d = box average of h, M = sigmoid(slope (d - q80(d))).
// n is an increasing affine map of g, so n - q80(n) = (g - q80(g))/(q95 - q05 + eps): one selection serves three
// quantiles.

#include "common.h"

#include <array>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../box_average.h"
#include "../density_mask.h"
#include "../order_statistics.h"

namespace sib_ext {
namespace {

// ---------------------------------------------------------------------------------------- order statistics

constexpr int kBins = 1 << 13;

// Non-negative floats sort like their bits; the top 13 after the sign make a histogram of 32 bins per octave.
// Rounding a double to float keeps the order, so the bins serve both types.
template <class T>
SIB_INLINE int bin_of(T v) { return static_cast<int>(to_bits(static_cast<float>(v)) >> 18); }

template <class T>
struct Selection {
  using Candidate = std::pair<T, int64_t>;
  std::vector<uint32_t> counts = std::vector<uint32_t>(kBins);
  std::vector<uint8_t> wanted = std::vector<uint8_t>(kBins);
  std::vector<Candidate> candidates[kRows];

  // The pixels at sorted positions [starts[i], starts[i] + size) of v (ties in pixel order), for each i.
  template <size_t Picks>
  void run(const T* v, int64_t n, const std::array<int64_t, Picks>& starts, int64_t size,
           const std::array<int64_t*, Picks>& pixels) {
    std::fill(counts.begin(), counts.end(), 0);
    std::fill(wanted.begin(), wanted.end(), 0);
    for (int64_t p = 0; p < n; ++p) ++counts[bin_of(v[p])];

    std::array<int64_t, Picks> before{};
    for (size_t i = 0; i < Picks; ++i) {
      candidates[i].clear();
      int64_t below = 0;
      for (int bin = 0; below < starts[i] + size; below += counts[bin], ++bin) {
        if (below + counts[bin] <= starts[i]) continue;
        if (below <= starts[i]) before[i] = below;
        wanted[bin] |= 1u << i;
      }
    }
    for (int64_t p = 0; p < n; ++p) {
      const uint8_t picks = wanted[bin_of(v[p])];
      if (__builtin_expect(picks != 0, 0)) {
        for (size_t i = 0; i < Picks; ++i)
          if (picks & (1u << i)) candidates[i].emplace_back(v[p], p);
      }
    }
    for (size_t i = 0; i < Picks; ++i) {
      // Pairs differ in the pixel, so the order is total and the result does not depend on the algorithm.
      const auto first = candidates[i].begin() + (starts[i] - before[i]), last = first + size;
      if (first != candidates[i].begin()) std::nth_element(candidates[i].begin(), first, candidates[i].end());
      if (last != candidates[i].end()) std::nth_element(first, last, candidates[i].end());
      std::sort(first, last);
      for (int64_t k = 0; k < size; ++k) pixels[i][k] = first[k].second;
    }
  }
};

template <class T>
T weighted_sum(const T* v, const int64_t* pixels, const T* weights, int64_t size) {
  T total = 0;
  for (int64_t k = 0; k < size; ++k) total += v[pixels[k]] * weights[k];
  return total;
}

// -------------------------------------------------------------------------------------------- box average

// out(y, sums) gets each row of window sums of the rows that in(y, row) writes; O(1) per pixel.
// Sums slide in double: adding and later subtracting the same floats leaves no drift.
template <class T, class In, class Out>
SIB_INLINE void box_sums(int64_t H, int64_t W, int64_t radius, T* plane, std::vector<double>& columns,
                         std::vector<T>& scratch, In in, Out out) {
  const int64_t rx = std::min(radius, W - 1), ry = std::min(radius, H - 1);
  scratch.assign(W + 2 * rx + 1, T(0));
  T* row = scratch.data() + rx + 1;
  for (int64_t y = 0; y < H; ++y) {
    in(y, row);
    double sum = 0;
    for (int64_t x = 0; x < rx; ++x) sum += row[x];
    for (int64_t x = 0; x < W; ++x) {
      sum += static_cast<double>(row[x + rx]) - static_cast<double>(row[x - rx - 1]);
      plane[y * W + x] = static_cast<T>(sum);
    }
  }
  columns.assign(W, 0);
  double* sums = columns.data();
  for (int64_t y = 0; y < ry; ++y)
    for (int64_t x = 0; x < W; ++x) sums[x] += plane[y * W + x];
  for (int64_t y = 0; y < H; ++y) {
    if (y + ry < H)
      for (int64_t x = 0; x < W; ++x) sums[x] += plane[(y + ry) * W + x];
    if (y - ry > 0)
      for (int64_t x = 0; x < W; ++x) sums[x] -= plane[(y - ry - 1) * W + x];
    out(y, sums);
  }
}

// 1 / divisor of the average at a pixel, as a product of a row's and a column's factor.
inline double inverse_span(int64_t position, int64_t size, const Options& o) {
  return 1.0 / box_span(position, size, o.radius, o.count_padding);
}

// ------------------------------------------------------------------------------------------ one sample's M

template <class T>
struct Workspace {
  Selection<T> selection;
  std::vector<double> columns, inverse;
  std::vector<T> plane, second, scratch, weights[kRows];

  explicit Workspace(const Options& o) : inverse(o.W), plane(o.pixels()), second(o.pixels()) {
    for (int row = 0; row < kRows; ++row) {
      weights[row].resize(o.support);
      support_weights(o.pixels(), o.quantile(row), o.temperature, o.support, weights[row].data());
    }
    for (int64_t x = 0; x < o.W; ++x) inverse[x] = inverse_span(x, o.W, o);
  }
};

// mean_c R of one sample, pixel stride Stride (0: taken from the layout).
template <int Stride, class S, class T>
SIB_INLINE void channel_mean(const S* R, Layout layout, const Options& o, T* mean) {
  const int64_t stride = Stride ? Stride : layout.pixel, P = o.pixels(), block = 1024;
  const T channels = static_cast<T>(o.C);
  for (int64_t start = 0; start < P; start += block) {
    const int64_t stop = std::min(P, start + block);
    SIB_SIMD for (int64_t p = start; p < stop; ++p) mean[p] = widen(R[p * stride]);
    for (int64_t c = 1; c < o.C; ++c) {
      const S* channel = R + c * layout.channel;
      SIB_SIMD for (int64_t p = start; p < stop; ++p) mean[p] += widen(channel[p * stride]);
    }
    SIB_SIMD for (int64_t p = start; p < stop; ++p) mean[p] /= channels;
  }
}

template <class S, class T>
SIB_INLINE void channel_mean(const S* R, Layout layout, const Options& o, T* mean) {
  layout.pixel == 1 ? channel_mean<1>(R, layout, o, mean) : channel_mean<0>(R, layout, o, mean);
}

template <class S, class T>
SIB_CLONES void forward_sample(const S* R, Layout layout, const Options& o, Workspace<T>& ws, T* mask, int64_t* support) {
  const int64_t P = o.pixels(), K = o.support, W = o.W;
  T *g = ws.plane.data(), *second = ws.second.data();
  channel_mean(R, layout, o, g);
  T poison = 0;  // stays 0 unless a value is NaN or Inf
#pragma omp simd reduction(+ : poison)
  for (int64_t p = 0; p < P; ++p) {
    g[p] = std::abs(g[p]);
    poison += g[p] * T(0);
  }
  if (!(poison == 0)) {
    std::fill(mask, mask + P, std::numeric_limits<T>::quiet_NaN());
    std::fill(support, support + kRows * K, 0);
    return;
  }

  const auto start = [&](int row) { return support_start(P, o.quantile(row), o.temperature, K); };
  ws.selection.template run<3>(g, P, {start(kRowLow), start(kRowHigh), start(kRowLevel)}, K,
                               {support + kRowLow * K, support + kRowHigh * K, support + kRowLevel * K});
  const auto quantile = [&](const T* v, int row) { return weighted_sum(v, support + row * K, ws.weights[row].data(), K); };
  const T level = quantile(g, kRowLevel);
  const T scale = static_cast<T>(o.slope) / (quantile(g, kRowHigh) - quantile(g, kRowLow) + static_cast<T>(o.eps));

  // d replaces g: a row of g is read before the row of d that lies over it is written.
  T* d = g;
  box_sums<T>(
      o.H, W, o.radius, second, ws.columns, ws.scratch,
      [&](int64_t y, T* row) __attribute__((always_inline)) {
        const T* values = g + y * W;
        SIB_SIMD for (int64_t x = 0; x < W; ++x) row[x] = sigmoid((values[x] - level) * scale);
      },
      [&](int64_t y, const double* sums) __attribute__((always_inline)) {
        const double inverse_y = inverse_span(y, o.H, o);
        const double* inverse_x = ws.inverse.data();
        SIB_SIMD for (int64_t x = 0; x < W; ++x) d[y * W + x] = static_cast<T>(std::max(sums[x], 0.0) * (inverse_y * inverse_x[x]));
      });

  ws.selection.template run<1>(d, P, {start(kRowAverage)}, K, {support + kRowAverage * K});
  const T threshold = quantile(d, kRowAverage), slope = static_cast<T>(o.slope);
  SIB_SIMD for (int64_t p = 0; p < P; ++p) mask[p] = sigmoid(slope * (d[p] - threshold));
}

// -------------------------------------------------------- one sample's dL/dR_c, the same for every channel c

template <class T>
SIB_INLINE void subtract_at(T* v, const int64_t* pixels, const T* weights, int64_t size, double total) {
  for (int64_t k = 0; k < size; ++k) v[pixels[k]] -= static_cast<T>(total * weights[k]);
}

template <class S, class T>
SIB_CLONES void backward_sample(const T* grad_mask, const S* R, Layout layout, const T* mask, const int64_t* support,
                                const Options& o, Workspace<T>& ws, S* grad) {
  const int64_t P = o.pixels(), K = o.support, W = o.W;
  T *plane = ws.plane.data(), *mean = ws.second.data();
  const T slope = static_cast<T>(o.slope);
  const auto weights = [&](int row) { return ws.weights[row].data(); };
  const auto pixels = [&](int row) { return support + row * K; };

  // Through M = sigmoid(slope (d - q80(d))).
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t p = 0; p < P; ++p) {
    plane[p] = grad_mask[p] * slope * mask[p] * (1 - mask[p]);
    total += plane[p];
  }
  subtract_at(plane, pixels(kRowAverage), weights(kRowAverage), K, total);

  // Through the box average, whose transpose is itself once the divisor is applied; then h, n and the quantiles of g.
  const T* cotangent = plane;
  T* sums_of_rows = mean;
  box_sums<T>(
      o.H, W, o.radius, sums_of_rows, ws.columns, ws.scratch,
      [&](int64_t y, T* row) __attribute__((always_inline)) {
        const double inverse_y = inverse_span(y, o.H, o);
        const double* inverse_x = ws.inverse.data();
        SIB_SIMD for (int64_t x = 0; x < W; ++x)
          row[x] = cotangent[y * W + x] * static_cast<T>(inverse_y * inverse_x[x]);
      },
      [&](int64_t y, const double* sums) __attribute__((always_inline)) {
        SIB_SIMD for (int64_t x = 0; x < W; ++x) plane[y * W + x] = static_cast<T>(sums[x]);
      });

  channel_mean(R, layout, o, mean);
  const auto quantile = [&](int row) {
    T q = 0;
    for (int64_t k = 0; k < K; ++k) q += std::abs(mean[pixels(row)[k]]) * weights(row)[k];
    return q;
  };
  const T level = quantile(kRowLevel);
  const T scale = T(1) / (quantile(kRowHigh) - quantile(kRowLow) + static_cast<T>(o.eps));
  double sum = 0, slip = 0;
#pragma omp simd reduction(+ : sum, slip)
  for (int64_t p = 0; p < P; ++p) {
    const T u = (std::abs(mean[p]) - level) * scale;
    const T h = sigmoid(slope * u);
    const T through = plane[p] * slope * h * (1 - h);
    slip += through * u;
    plane[p] = through * scale;
    sum += plane[p];
  }
  subtract_at(plane, pixels(kRowLevel), weights(kRowLevel), K, sum);
  subtract_at(plane, pixels(kRowHigh), weights(kRowHigh), K, slip * scale);
  subtract_at(plane, pixels(kRowLow), weights(kRowLow), K, -slip * scale);

  // Through g = |mean_c R|.
  const T share = T(1) / static_cast<T>(o.C);
  SIB_SIMD for (int64_t p = 0; p < P; ++p)
    grad[p] = static_cast<S>(plane[p] * (mean[p] > 0 ? share : mean[p] < 0 ? -share : mean[p]));
}

// --------------------------------------------------------------------------------------------------- ops

std::tuple<Tensor, Tensor> density_mask(const Tensor& vjp, int64_t window, double temperature, double slope, double eps,
                                        std::string padding, double area) {
  const Options o = options_of(vjp, window, temperature, slope, eps, padding, area);
  const Tensor R = canonical(vjp);
  const int64_t B = R.size(0);
  Tensor mask = empty_dense(R, {B, 1, o.H, o.W}, accumulation_type(R.scalar_type()));
  Tensor support = empty_dense(R, {B, kRows, o.support}, ScalarType::Long);
  const Layout layout = layout_of(R);
  dispatch_floating("vjp", R.scalar_type(), [&](auto type) {
    using S = decltype(type);
    using T = Accumulate<S>;
    const S* field = data<S>(R);
    T* m = mutable_data<T>(mask);
    int64_t* pixels = mutable_data<int64_t>(support);
    torch::stable::parallel_for(0, B, 1, [&](int64_t first, int64_t last) {
      Workspace<T> ws(o);
      for (int64_t b = first; b < last; ++b)
        forward_sample<S, T>(field + b * layout.batch, layout, o, ws, m + b * o.pixels(), pixels + b * kRows * o.support);
    });
  });
  return {mask, support};
}

Tensor density_mask_backward(const Tensor& grad_mask, const Tensor& vjp, const Tensor& mask, const Tensor& support,
                             int64_t window, double temperature, double slope, double eps, std::string padding,
                             double area) {
  const Options o = options_of(vjp, window, temperature, slope, eps, padding, area);
  check_saved(grad_mask, vjp, mask, support, o);
  const int64_t B = vjp.size(0);
  const Tensor R = canonical(vjp), G = torch::stable::contiguous(grad_mask), M = torch::stable::contiguous(mask);
  const Tensor picks = torch::stable::contiguous(support);
  Tensor grad = empty_dense(R, {B, 1, o.H, o.W}, R.scalar_type());
  const Layout layout = layout_of(R);
  dispatch_floating("vjp", R.scalar_type(), [&](auto type) {
    using S = decltype(type);
    using T = Accumulate<S>;
    const S* field = data<S>(R);
    const T *cotangent = data<T>(G), *m = data<T>(M);
    const int64_t* pixels = data<int64_t>(picks);
    S* out = mutable_data<S>(grad);
    torch::stable::parallel_for(0, B, 1, [&](int64_t first, int64_t last) {
      Workspace<T> ws(o);
      for (int64_t b = first; b < last; ++b)
        backward_sample<S, T>(cotangent + b * o.pixels(), field + b * layout.batch, layout, m + b * o.pixels(),
                              pixels + b * kRows * o.support, o, ws, out + b * o.pixels());
    });
  });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_ext, CPU, m) {
  m.impl("density_mask", TORCH_BOX(&density_mask));
  m.impl("density_mask_backward", TORCH_BOX(&density_mask_backward));
}

}  // namespace sib_ext
