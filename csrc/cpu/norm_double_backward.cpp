// norm_double_backward on the CPU: the second derivative of batch and group normalisation in two passes.
//
// A group is what is normalised together: a channel of the whole batch, or some channels of one sample. Its rows are
// the planes [S] of its channels. Pass 1 sums v, g, v*xhat, g*xhat and v*g over each row; pass 2 writes both gradients
// as linear combinations of v, g and xhat. A group is one thread's, so results do not depend on the number of threads.

#include "common.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

namespace sib_ext {
namespace {

constexpr int64_t kChunk = 512;  // elements summed in the working type before the sum goes into float64

struct RowSums {
  double v = 0, g = 0, vx = 0, gx = 0, vg = 0;
};

template <class S, class T>
SIB_INLINE void add_row(const S* v, const S* g, const S* x, int64_t length, T mean, T rstd, RowSums& sums) {
  for (int64_t begin = 0; begin < length; begin += kChunk) {
    const int64_t end = std::min(length, begin + kChunk);
    T sum_v = 0, sum_g = 0, sum_vx = 0, sum_gx = 0, sum_vg = 0;
#pragma omp simd reduction(+ : sum_v, sum_g, sum_vx, sum_gx, sum_vg)
    for (int64_t i = begin; i < end; ++i) {
      const T vi = widen(v[i]), gi = widen(g[i]), xi = (widen(x[i]) - mean) * rstd;
      sum_v += vi;
      sum_g += gi;
      sum_vx += vi * xi;
      sum_gx += gi * xi;
      sum_vg += vi * gi;
    }
    sums.v += sum_v;
    sums.g += sum_g;
    sums.vx += sum_vx;
    sums.gx += sum_gx;
    sums.vg += sum_vg;
  }
}

// grad_g = p_v v + p_x xhat + p_1 and grad_x = q_x xhat + q_g g + q_v v + q_1
template <class T>
struct Coefficients {
  T p_v, p_x, p_1, q_x, q_g, q_v, q_1;
};

template <class S, class T>
SIB_INLINE void write_row(const S* v, const S* g, const S* x, int64_t length, T mean, T rstd, const Coefficients<T>& k, S* grad_g, S* grad_x) {
  SIB_SIMD
  for (int64_t i = 0; i < length; ++i) {
    const T vi = widen(v[i]), gi = widen(g[i]), xi = (widen(x[i]) - mean) * rstd;
    grad_g[i] = S(k.p_v * vi + k.p_x * xi + k.p_1);
    grad_x[i] = S(k.q_x * xi + k.q_g * gi + k.q_v * vi + k.q_1);
  }
}

template <class S>
struct Arguments {
  using T = Accumulate<S>;
  const S *v, *g, *x;
  const T *mean, *rstd, *weight;  // weight may be null: all ones
  S *grad_g, *grad_x;
  int64_t batch, channels, groups, length;
  bool over_batch;

  int64_t group_count() const { return over_batch ? groups : batch * groups; }
  int64_t rows() const { return over_batch ? batch : channels / groups; }
  int64_t channel(int64_t group, int64_t row) const { return over_batch ? group : group % groups * rows() + row; }
  int64_t offset(int64_t group, int64_t row) const {
    return ((over_batch ? row : group / groups) * channels + channel(group, row)) * length;
  }
};

template <class S>
SIB_CLONES void run_group(const Arguments<S>& in, int64_t group, RowSums* sums, double* channel_sums) {
  using T = Accumulate<S>;
  const int64_t rows = in.rows();
  const double count = static_cast<double>(rows) * static_cast<double>(in.length);
  const T mean = in.mean[group], rstd = in.rstd[group];
  double v0 = 0, h0 = 0, a = 0, b = 0, c = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = in.offset(group, row);
    sums[row] = {};
    add_row<S, T>(in.v + at, in.g + at, in.x + at, in.length, mean, rstd, sums[row]);
    const double w = in.weight ? in.weight[in.channel(group, row)] : 1;
    v0 += sums[row].v / count;
    h0 += w * sums[row].g / count;
    a += w * sums[row].gx / count;
    b += sums[row].vx / count;
    c += w * sums[row].vg / count;
  }
  const double r = rstd, r2 = r * r;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = in.offset(group, row);
    const double w = in.weight ? in.weight[in.channel(group, row)] : 1;
    const Coefficients<T> k{T(w * r), T(-w * r * b), T(-w * r * v0), T(-r2 * (c - v0 * h0 - 3 * a * b)), T(-r2 * b * w), T(-r2 * a), T(r2 * (b * h0 + a * v0))};
    write_row<S, T>(in.v + at, in.g + at, in.x + at, in.length, mean, rstd, k, in.grad_g + at, in.grad_x + at);
    channel_sums[at / in.length] = r * (sums[row].vg - v0 * sums[row].g - b * sums[row].gx);
  }
}

template <class S>
void run(const Arguments<S>& in, Accumulate<S>* grad_weight) {
  std::vector<double> channel_sums(in.batch * in.channels);
  torch::stable::parallel_for(0, in.group_count(), 1, [&](int64_t first, int64_t last) {
    std::vector<RowSums> sums(in.rows());
    for (int64_t group = first; group < last; ++group) run_group(in, group, sums.data(), channel_sums.data());
  });
  for (int64_t channel = 0; channel < in.channels; ++channel) {
    double total = 0;
    for (int64_t sample = 0; sample < in.batch; ++sample) total += channel_sums[sample * in.channels + channel];
    grad_weight[channel] = static_cast<Accumulate<S>>(total);
  }
}

void check_like(const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == x.dim() && t.numel() == x.numel() && t.size(0) == x.size(0) && t.size(1) == x.size(1),
                  name, " must have the size of x");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the type of x");
}

std::tuple<Tensor, Tensor, Tensor> norm_double_backward(const Tensor& grad_grad, const Tensor& grad, const Tensor& input,
                                                        const Tensor& mean, const Tensor& rstd, std::optional<Tensor> weight, double) {
  STD_TORCH_CHECK(input.dim() >= 2, "x must be [B,C,...], got ", input.dim(), " dimensions");
  check_like("grad_grad", grad_grad, input);
  check_like("grad", grad, input);
  const int64_t batch = input.size(0), channels = input.size(1);
  const bool over_batch = mean.dim() == 1;
  const int64_t groups = mean.size(mean.dim() - 1);
  STD_TORCH_CHECK(over_batch ? groups == channels : mean.dim() == 2 && mean.size(0) == batch && groups > 0 && channels % groups == 0,
                  "mean must be [C] (batch normalisation) or [B,G] with G a divisor of C (group normalisation)");
  const ScalarType type = accumulation_type(input.scalar_type());
  STD_TORCH_CHECK(mean.numel() == rstd.numel() && mean.scalar_type() == type && rstd.scalar_type() == type,
                  "mean and rstd must have one size and the accumulation type of x");
  if (weight) STD_TORCH_CHECK(weight->numel() == channels && weight->scalar_type() == type, "weight must be [C] in the accumulation type of x");

  const auto dense = [](const Tensor& t) { return torch::stable::contiguous(t); };
  const Tensor v = dense(grad_grad), g = dense(grad), x = dense(input), m = dense(mean), r = dense(rstd);
  const Tensor w = weight ? dense(*weight) : m;
  Tensor grad_g = torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device());
  Tensor grad_x = torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device());
  Tensor grad_weight = empty_dense(x, {channels}, type);
  if (x.numel() == 0) return {grad_g, grad_x, torch::stable::fill_(grad_weight, 0)};
  const int64_t length = x.numel() / (batch * channels);
  dispatch_floating("x", x.scalar_type(), [&](auto scalar) {
    using S = decltype(scalar);
    using T = Accumulate<S>;
    run(Arguments<S>{data<S>(v), data<S>(g), data<S>(x), data<T>(m), data<T>(r), weight ? data<T>(w) : nullptr,
                     mutable_data<S>(grad_g), mutable_data<S>(grad_x), batch, channels, groups, length, over_batch},
        mutable_data<T>(grad_weight));
  });
  return {grad_g, grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_ext, CPU, m) {
  m.impl("norm_double_backward", TORCH_BOX(&norm_double_backward));
}

}  // namespace sib_ext
