// norm_double_backward on the CPU: the second derivative of batch and group normalisation in two passes.
//
// Pass 1 sums v, g, v*xhat, g*xhat and v*g over each row; pass 2 writes both gradients as linear combinations of v, g
// and xhat. A group is one thread's, so results do not depend on the number of threads.

#include "common.h"

#include <algorithm>
#include <tuple>

#include "../check_normalisation.h"

namespace sib_ext {
namespace {

constexpr int64_t kChunk = 512;  // elements summed in the working type before the sum goes into float64

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

template <class S, class T>
SIB_INLINE void write_row(const S* v, const S* g, const S* x, int64_t length, T mean, T rstd, const RowCoefficients<T>& k,
                          S* grad_g, S* grad_x) {
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
};

template <class S>
SIB_CLONES void run_group(const Normalisation& shape, const Arguments<S>& in, int64_t group, RowSums* sums,
                          double* weight_parts) {
  using T = Accumulate<S>;
  const double count = static_cast<double>(shape.rows()) * static_cast<double>(shape.length);
  const T mean = in.mean[group], rstd = in.rstd[group];
  const auto weight = [&](int64_t row) { return in.weight ? double(in.weight[shape.channel(group, row)]) : 1.0; };
  GroupAverages averages;
  for (int64_t row = 0; row < shape.rows(); ++row) {
    const int64_t at = shape.place(group, row) * shape.length;
    sums[row] = {};
    add_row<S, T>(in.v + at, in.g + at, in.x + at, shape.length, mean, rstd, sums[row]);
    averages.add(sums[row], weight(row), count);
  }
  for (int64_t row = 0; row < shape.rows(); ++row) {
    const int64_t place = shape.place(group, row), at = place * shape.length;
    const RowCoefficients<T> k = row_coefficients<T>(averages, weight(row), rstd);
    write_row<S, T>(in.v + at, in.g + at, in.x + at, shape.length, mean, rstd, k, in.grad_g + at, in.grad_x + at);
    weight_parts[place] = weight_gradient(averages, sums[row], rstd);
  }
}

template <class S>
void run(const Normalisation& shape, const Arguments<S>& in, Accumulate<S>* grad_weight) {
  std::vector<double> weight_parts(shape.batch * shape.channels);
  torch::stable::parallel_for(0, shape.group_count(), 1, [&](int64_t first, int64_t last) {
    std::vector<RowSums> sums(shape.rows());
    for (int64_t group = first; group < last; ++group) run_group(shape, in, group, sums.data(), weight_parts.data());
  });
  for (int64_t channel = 0; channel < shape.channels; ++channel) {
    double total = 0;
    for (int64_t b = 0; b < shape.batch; ++b) total += weight_parts[b * shape.channels + channel];
    grad_weight[channel] = static_cast<Accumulate<S>>(total);
  }
}

std::tuple<Tensor, Tensor, Tensor> norm_double_backward(const Tensor& grad_grad, const Tensor& grad, const Tensor& input,
                                                        const Tensor& mean, const Tensor& rstd,
                                                        std::optional<Tensor> weight, double) {
  check_like("grad_grad", grad_grad, input);
  const Normalisation shape = check_normalisation(grad, input, mean, rstd, weight);
  const auto dense = [](const Tensor& t) { return torch::stable::contiguous(t); };
  const Tensor v = dense(grad_grad), g = dense(grad), x = dense(input), m = dense(mean), r = dense(rstd);
  const Tensor w = weight ? dense(*weight) : m;
  Tensor grad_g = empty_contiguous(x), grad_x = empty_contiguous(x), grad_weight = empty_dense(m, {shape.channels}, m.scalar_type());
  if (x.numel() == 0) return {grad_g, grad_x, torch::stable::fill_(grad_weight, 0)};
  dispatch_floating("x", x.scalar_type(), [&](auto scalar) {
    using S = decltype(scalar);
    using T = Accumulate<S>;
    run(shape,
        Arguments<S>{data<S>(v), data<S>(g), data<S>(x), data<T>(m), data<T>(r), weight ? data<T>(w) : nullptr,
                     mutable_data<S>(grad_g), mutable_data<S>(grad_x)},
        mutable_data<T>(grad_weight));
  });
  return {as_field(grad_g, input), as_field(grad_x, input), grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_ext, CPU, m) {
  m.impl("norm_double_backward", TORCH_BOX(&norm_double_backward));
}

}  // namespace sib_ext
