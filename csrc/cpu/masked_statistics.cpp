// masked_statistics on the CPU: one pass over R, x and M in chunks of pixels; R*M and x*M live in cache only.
//
//   a = R*M, b = x*M, c = R*(1-M); moments [B,9] = sums of a, b, a^2, b^2, ab, c, c^2, |R|M, |R|(1-M);
//   Grams a a^T and b b^T.
// Work is cut into ranges of pixels (all samples, all channels). The cut depends on the sizes alone and partial sums
// are added in its order, so results do not depend on the number of threads.

#include "common.h"

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../masked_statistics.h"

namespace sib_ext {
namespace {

constexpr int64_t kChunk = 512;        // pixels a chunk: a row of a or b is 2 KB of float
constexpr int kRowBlock = 4;           // Gram tiles: 4 x 2 rows, products: 4 rows x 2 vectors
constexpr int64_t kMaxPartials = 64;   // at most this many ranges, and at most kPartialBytes of partial Grams
constexpr int64_t kPartialBytes = 64 << 20;

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(64)));  // the compiler splits it where registers are narrower
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kLanes = 64 / sizeof(T);

template <class T>
SIB_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

int64_t padded(int64_t batch) { return (batch + kRowBlock - 1) / kRowBlock * kRowBlock; }

struct Ranges {
  int64_t count, length;

  Ranges(int64_t pixels, int64_t batch) {
    const int64_t chunks = (pixels + kChunk - 1) / kChunk;
    const int64_t affordable = std::max<int64_t>(1, kPartialBytes / (16 * std::max<int64_t>(1, batch * batch)));
    const int64_t wanted = std::min({kMaxPartials, chunks, affordable});
    length = (chunks + wanted - 1) / wanted * kChunk;
    count = (pixels + length - 1) / length;
  }
};

// -------------------------------------------------------------------------------------------------- Gram

// gram[i][j] += <rows_i, rows_j> for j <= i (whole 4 x 2 tiles); rows are kChunk long, padded with zeros.
template <class T>
SIB_INLINE void add_gram(const T* rows, int64_t batch, int64_t length, double* gram) {
  const int64_t B = padded(batch), L = (length + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  for (int64_t i = 0; i < B; i += kRowBlock) {
    for (int64_t j = 0; j < i + kRowBlock; j += 2) {
      Vector<T> sums[kRowBlock][2] = {};
      for (int64_t k = 0; k < L; k += kLanes<T>) {
        const Vector<T> left = load(rows + j * kChunk + k), right = load(rows + (j + 1) * kChunk + k);
        for (int r = 0; r < kRowBlock; ++r) {
          const Vector<T> row = load(rows + (i + r) * kChunk + k);
          sums[r][0] += row * left;
          sums[r][1] += row * right;
        }
      }
      for (int r = 0; r < kRowBlock; ++r)
        for (int s = 0; s < 2; ++s) {
          double total = 0;
          for (int64_t lane = 0; lane < kLanes<T>; ++lane) total += sums[r][s][lane];
          gram[(i + r) * B + j + s] += total;
        }
    }
  }
}

// product = weights [batch,batch] @ rows.
template <class T>
SIB_INLINE void multiply(const T* weights, const T* rows, int64_t batch, int64_t length, T* product) {
  const int64_t B = padded(batch), step = 2 * kLanes<T>;
  for (int64_t i = 0; i < B; i += kRowBlock) {
    for (int64_t k = 0; k < length; k += step) {
      Vector<T> sums[kRowBlock][2] = {};
      for (int64_t j = 0; j < batch; ++j) {
        const Vector<T> low = load(rows + j * kChunk + k), high = load(rows + j * kChunk + k + kLanes<T>);
        for (int r = 0; r < kRowBlock; ++r) {
          const T weight = weights[(i + r) * B + j];
          sums[r][0] += weight * low;
          sums[r][1] += weight * high;
        }
      }
      for (int r = 0; r < kRowBlock; ++r) std::memcpy(product + (i + r) * kChunk + k, sums[r], sizeof sums[r]);
    }
  }
}

// ------------------------------------------------------------------------------------------------ forward

template <class S>
struct Inputs {
  using T = Accumulate<S>;
  const S *R, *x;
  const T* M;
  Layout layout_R, layout_x;
  int64_t B, C, P;
};

// a and b of one channel's chunk of one sample into rows; its sums into moments.
template <int Stride, class S, class T>
SIB_INLINE void add_moments(const S* R, const S* x, const T* M, int64_t stride_R, int64_t stride_x, int64_t length,
                            T* row_a, T* row_b, double* moments) {
  if (Stride) stride_R = stride_x = Stride;
  T sum_a = 0, sum_b = 0, sum_aa = 0, sum_bb = 0, sum_ab = 0, sum_c = 0, sum_cc = 0, sum_abs_a = 0, sum_abs_c = 0;
#pragma omp simd reduction(+ : sum_a, sum_b, sum_aa, sum_bb, sum_ab, sum_c, sum_cc, sum_abs_a, sum_abs_c)
  for (int64_t p = 0; p < length; ++p) {
    const T r = widen(R[p * stride_R]), m = M[p];
    const T a = r * m, b = widen(x[p * stride_x]) * m, c = r * (1 - m);
    row_a[p] = a;
    row_b[p] = b;
    sum_a += a;
    sum_b += b;
    sum_aa += a * a;
    sum_bb += b * b;
    sum_ab += a * b;
    sum_c += c;
    sum_cc += c * c;
    sum_abs_a += std::abs(r) * m;
    sum_abs_c += std::abs(r) * (1 - m);
  }
  const T sums[kMoments] = {sum_a, sum_b, sum_aa, sum_bb, sum_ab, sum_c, sum_cc, sum_abs_a, sum_abs_c};
  for (int i = 0; i < kMoments; ++i) moments[i] += sums[i];
}

// gram_a and gram_b may be null.
template <class S, class T>
SIB_CLONES void forward_range(const Inputs<S>& in, int64_t begin, int64_t end, T* rows_a, T* rows_b, double* moments,
                              double* gram_a, double* gram_b) {
  const bool dense = in.layout_R.pixel == 1 && in.layout_x.pixel == 1;
  for (int64_t start = begin; start < end; start += kChunk) {
    const int64_t length = std::min(kChunk, end - start);
    for (int64_t c = 0; c < in.C; ++c) {
      for (int64_t b = 0; b < in.B; ++b) {
        const S* R = in.R + b * in.layout_R.batch + c * in.layout_R.channel + start * in.layout_R.pixel;
        const S* x = in.x + b * in.layout_x.batch + c * in.layout_x.channel + start * in.layout_x.pixel;
        const T* M = in.M + b * in.P + start;
        T *row_a = rows_a + b * kChunk, *row_b = rows_b + b * kChunk;
        if (length < kChunk) {
          std::fill(row_a + length, row_a + kChunk, T(0));
          std::fill(row_b + length, row_b + kChunk, T(0));
        }
        if (dense) {
          add_moments<1>(R, x, M, 1, 1, length, row_a, row_b, moments + b * kMoments);
        } else {
          add_moments<0>(R, x, M, in.layout_R.pixel, in.layout_x.pixel, length, row_a, row_b, moments + b * kMoments);
        }
      }
      if (gram_a) add_gram(rows_a, in.B, length, gram_a);
      if (gram_b) add_gram(rows_b, in.B, length, gram_b);
    }
  }
}

// Sums the partial results of all ranges in their order.
template <class T>
void reduce_gram(const std::vector<double>& partials, int64_t ranges, int64_t batch, T* gram) {
  const int64_t B = padded(batch);
  for (int64_t i = 0; i < batch; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      double total = 0;
      for (int64_t range = 0; range < ranges; ++range) total += partials[(range * B + i) * B + j];
      gram[i * batch + j] = gram[j * batch + i] = static_cast<T>(total);
    }
}

template <class S>
void forward(const Inputs<S>& in, bool keep_a, bool keep_b, Tensor& moments, Tensor& gram_a, Tensor& gram_b) {
  using T = Accumulate<S>;
  const int64_t B = padded(in.B);
  const Ranges ranges(in.P, in.B);
  std::vector<double> sums(ranges.count * in.B * kMoments);
  std::vector<double> partials_a(keep_a ? ranges.count * B * B : 0), partials_b(keep_b ? ranges.count * B * B : 0);
  torch::stable::parallel_for(0, ranges.count, 1, [&](int64_t first, int64_t last) {
    std::vector<T> rows_a(B * kChunk), rows_b(B * kChunk);
    for (int64_t range = first; range < last; ++range) {
      const int64_t begin = range * ranges.length, end = std::min(in.P, begin + ranges.length);
      const auto partial = [&](std::vector<double>& all) { return all.empty() ? nullptr : &all[range * B * B]; };
      forward_range<S, T>(in, begin, end, rows_a.data(), rows_b.data(), sums.data() + range * in.B * kMoments,
                          partial(partials_a), partial(partials_b));
    }
  });
  T* out = mutable_data<T>(moments);
  for (int64_t i = 0; i < in.B * kMoments; ++i) {
    double total = 0;
    for (int64_t range = 0; range < ranges.count; ++range) total += sums[range * in.B * kMoments + i];
    out[i] = static_cast<T>(total);
  }
  if (keep_a) reduce_gram(partials_a, ranges.count, in.B, mutable_data<T>(gram_a));
  if (keep_b) reduce_gram(partials_b, ranges.count, in.B, mutable_data<T>(gram_b));
}

// ----------------------------------------------------------------------------------------------- backward

template <class S>
struct Cotangents {
  using T = Accumulate<S>;
  const T* moments;                       // [B,9]
  const std::vector<T>&gram_a, &gram_b;   // padded G + G^T; empty where there is none
};

template <class S>
struct Gradients {
  using T = Accumulate<S>;
  S *R, *x;
  T* M;  // x and M may be null
};

template <int Stride, class S>
SIB_INLINE void pack(const S* field, const Accumulate<S>* M, int64_t stride, int64_t length, Accumulate<S>* row) {
  if (Stride) stride = Stride;
  SIB_SIMD for (int64_t p = 0; p < length; ++p) row[p] = widen(field[p * stride]) * M[p];
  std::fill(row + length, row + kChunk, Accumulate<S>(0));
}

// One channel's chunk of one sample: dR and, if asked, dx and the channel's part of dM.
template <int Stride, bool NeedX, bool NeedMask, class S, class T>
SIB_INLINE void sample_gradients(const S* R, const S* x, const T* M, const T* g, const T* from_gram_a,
                                 const T* from_gram_b, int64_t stride_R, int64_t stride_x, int64_t length, bool first,
                                 S* grad_R, S* grad_x, T* grad_M) {
  if (Stride) stride_R = stride_x = Stride;
  const T g_a = g[0], g_b = g[1], g_aa = 2 * g[2], g_bb = 2 * g[3], g_ab = g[4], g_c = g[5], g_cc = 2 * g[6];
  const T g_abs_a = g[7], g_abs_c = g[8];
  const T keep = first ? T(0) : T(1);
  if (NeedMask && first) std::fill(grad_M, grad_M + length, T(0));
  SIB_SIMD for (int64_t p = 0; p < length; ++p) {
    const T r = widen(R[p * stride_R]), value = widen(x[p * stride_x]), m = M[p], rest = 1 - m;
    const T a = r * m, b = value * m, c = r * rest, sign = static_cast<T>((r > 0) - (r < 0));
    const T grad_a = g_a + g_aa * a + g_ab * b + g_abs_a * sign + from_gram_a[p];
    const T grad_b = g_b + g_bb * b + g_ab * a + from_gram_b[p];
    const T grad_c = g_c + g_cc * c + g_abs_c * sign;
    grad_R[p * stride_R] = static_cast<S>(grad_a * m + grad_c * rest);
    if (NeedX) grad_x[p * stride_x] = static_cast<S>(grad_b * m);
    if (NeedMask) grad_M[p] = grad_M[p] * keep + ((grad_a - grad_c) * r + grad_b * value);
  }
}

template <bool NeedX, bool NeedMask, class S, class T>
SIB_CLONES void backward_range(const Inputs<S>& in, const Cotangents<S>& g, const Gradients<S>& grad, int64_t begin,
                               int64_t end, T* rows, T* from_a, T* from_b) {
  const bool dense = in.layout_R.pixel == 1 && in.layout_x.pixel == 1;
  // Rows of a (or b) weighted by the Gram's cotangent; zeros stay where there is none.
  const auto through_gram = [&](const S* field, const Layout& layout, const std::vector<T>& weights, int64_t c,
                                int64_t start, int64_t length, T* product) __attribute__((always_inline)) {
    if (weights.empty()) return;
    for (int64_t b = 0; b < in.B; ++b) {
      const S* source = field + b * layout.batch + c * layout.channel + start * layout.pixel;
      const T* M = in.M + b * in.P + start;
      layout.pixel == 1 ? pack<1>(source, M, 1, length, rows + b * kChunk)
                        : pack<0>(source, M, layout.pixel, length, rows + b * kChunk);
    }
    multiply(weights.data(), rows, in.B, length, product);
  };
  for (int64_t start = begin; start < end; start += kChunk) {
    const int64_t length = std::min(kChunk, end - start);
    for (int64_t c = 0; c < in.C; ++c) {
      through_gram(in.R, in.layout_R, g.gram_a, c, start, length, from_a);
      // dL/dR does not look at dL/db.
      if (NeedX || NeedMask) through_gram(in.x, in.layout_x, g.gram_b, c, start, length, from_b);
      for (int64_t b = 0; b < in.B; ++b) {
        const int64_t at_R = b * in.layout_R.batch + c * in.layout_R.channel + start * in.layout_R.pixel;
        const int64_t at_x = b * in.layout_x.batch + c * in.layout_x.channel + start * in.layout_x.pixel;
        const int64_t at_M = b * in.P + start;
        S* grad_x = NeedX ? grad.x + at_x : nullptr;
        T* grad_M = NeedMask ? grad.M + at_M : nullptr;
        const auto run = [&](auto stride) __attribute__((always_inline)) {
          sample_gradients<decltype(stride)::value, NeedX, NeedMask>(
              in.R + at_R, in.x + at_x, in.M + at_M, g.moments + b * kMoments, from_a + b * kChunk, from_b + b * kChunk,
              in.layout_R.pixel, in.layout_x.pixel, length, c == 0, grad.R + at_R, grad_x, grad_M);
        };
        dense ? run(std::integral_constant<int, 1>{}) : run(std::integral_constant<int, 0>{});
      }
    }
  }
}

// G + G^T with padded rows; empty where no cotangent was given.
template <class T>
std::vector<T> symmetrised(const std::optional<Tensor>& cotangent, int64_t batch) {
  if (!cotangent.has_value()) return {};
  const Tensor dense = torch::stable::contiguous(*cotangent);
  const T* g = data<T>(dense);
  const int64_t B = padded(batch);
  std::vector<T> sum(B * B);
  for (int64_t i = 0; i < batch; ++i)
    for (int64_t j = 0; j < batch; ++j) sum[i * B + j] = g[i * batch + j] + g[j * batch + i];
  return sum;
}

template <class S>
void backward(const Inputs<S>& in, const Cotangents<S>& g, const Gradients<S>& grad) {
  using T = Accumulate<S>;
  const int64_t B = padded(in.B);
  const Ranges ranges(in.P, 0);
  torch::stable::parallel_for(0, ranges.count, 1, [&](int64_t first, int64_t last) {
    const bool grams = !g.gram_a.empty() || !g.gram_b.empty();
    std::vector<T> rows(grams ? B * kChunk : 0), from_a(B * kChunk), from_b(B * kChunk);
    for (int64_t range = first; range < last; ++range) {
      const int64_t begin = range * ranges.length, end = std::min(in.P, begin + ranges.length);
      const auto with_x = grad.M ? backward_range<true, true, S, T> : backward_range<true, false, S, T>;
      const auto without_x = grad.M ? backward_range<false, true, S, T> : backward_range<false, false, S, T>;
      (grad.x ? with_x : without_x)(in, g, grad, begin, end, rows.data(), from_a.data(), from_b.data());
    }
  });
}

// --------------------------------------------------------------------------------------------------- ops

template <class S>
Inputs<S> inputs_of(const Tensor& R, const Tensor& x, const Tensor& M) {
  return {data<S>(R), data<S>(x), data<Accumulate<S>>(M), layout_of(R), layout_of(x), R.size(0), R.size(1), R.size(2) * R.size(3)};
}

std::tuple<Tensor, Tensor, Tensor> masked_statistics(const Tensor& vjp, const Tensor& input, const Tensor& mask,
                                                     bool gram_vjp, bool gram_input) {
  check_inputs(vjp, input, mask);
  const Tensor R = canonical(vjp), x = canonical(input), M = torch::stable::contiguous(mask);
  const int64_t B = R.size(0);
  const ScalarType type = accumulation_type(R.scalar_type());
  Tensor moments = empty_dense(R, {B, kMoments}, type);
  Tensor gram_a = empty_dense(R, {gram_vjp ? B : 0, gram_vjp ? B : 0}, type);
  Tensor gram_b = empty_dense(R, {gram_input ? B : 0, gram_input ? B : 0}, type);
  dispatch_floating("vjp", R.scalar_type(), [&](auto scalar) {
    forward(inputs_of<decltype(scalar)>(R, x, M), gram_vjp, gram_input, moments, gram_a, gram_b);
  });
  return {moments, gram_a, gram_b};
}

std::tuple<Tensor, Tensor, Tensor> masked_statistics_backward(const Tensor& grad_moments,
                                                              std::optional<Tensor> grad_gram_vjp,
                                                              std::optional<Tensor> grad_gram_input, const Tensor& vjp,
                                                              const Tensor& input, const Tensor& mask, bool need_x,
                                                              bool need_mask) {
  check_inputs(vjp, input, mask);
  const int64_t B = vjp.size(0);
  check_cotangent("grad_moments", grad_moments, B, kMoments, vjp);
  if (grad_gram_vjp) check_cotangent("grad_gram_vjp", *grad_gram_vjp, B, B, vjp);
  if (grad_gram_input) check_cotangent("grad_gram_input", *grad_gram_input, B, B, vjp);
  const Tensor R = canonical(vjp), x = canonical(input), M = torch::stable::contiguous(mask);
  const Tensor cotangent = torch::stable::contiguous(grad_moments);
  Tensor grad_R = empty_field(R), grad_x = need_x ? empty_field(x) : empty_dense(x, {0}, x.scalar_type());
  Tensor grad_M = need_mask ? empty_dense(M, {B, 1, M.size(2), M.size(3)}, M.scalar_type())
                            : empty_dense(M, {0}, M.scalar_type());
  dispatch_floating("vjp", R.scalar_type(), [&](auto scalar) {
    using S = decltype(scalar);
    using T = Accumulate<S>;
    const auto gram_a = symmetrised<T>(grad_gram_vjp, B), gram_b = symmetrised<T>(grad_gram_input, B);
    backward(inputs_of<S>(R, x, M), Cotangents<S>{data<T>(cotangent), gram_a, gram_b},
             Gradients<S>{mutable_data<S>(grad_R), need_x ? mutable_data<S>(grad_x) : nullptr,
                          need_mask ? mutable_data<T>(grad_M) : nullptr});
  });
  return {grad_R, grad_x, grad_M};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_ext, CPU, m) {
  m.impl("masked_statistics", TORCH_BOX(&masked_statistics));
  m.impl("masked_statistics_backward", TORCH_BOX(&masked_statistics_backward));
}

}  // namespace sib_ext
