// norm_double_backward on the CPU: the second derivative of batch and group normalisation in two passes.
//
// Pass 1 sums v, g, v*xhat, g*xhat and v*g over each row; pass 2 writes both gradients as linear combinations of v, g
// and xhat. A group is one thread's, so results do not depend on the number of threads.
//
// Batch normalisation of fields that are channels last is vectorised along the channels. Its positions are cut into
// parts by the sizes alone; a part is one thread's, and the parts' sums are added in order.

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

// ------------------------------------------------------------------------------------------ channels last

constexpr int64_t kLeastPart = 128, kMostParts = 64;  // positions of a part; parts, whose sums take memory
constexpr int64_t kLeastWidth = 128;                  // of a line: few channels would leave vectors empty

// The positions [B*H*W, C] as lines of one or more positions side by side.
struct Lines {
  int64_t positions, channels, part, side_by_side = 1;

  explicit Lines(const Normalisation& shape)
      : positions(shape.batch * shape.length),
        channels(shape.channels),
        part(std::max(kLeastPart, (positions + kMostParts - 1) / kMostParts)) {
    while (width() < kLeastWidth) side_by_side *= 2;
  }

  int64_t width() const { return channels * side_by_side; }
  int64_t parts() const { return (positions + part - 1) / part; }
  int64_t end_of(int64_t number) const { return std::min(positions, (number + 1) * part); }
};

template <class T>
struct LineSums {
  T *v, *g, *vx, *gx, *vg;
};

template <class T>
struct LineCoefficients {
  const T *mean, *rstd, *p_v, *p_x, *p_1, *q_x, *q_g, *q_v, *q_1;
};

// One value of each channel, repeated along a line.
template <class T, class F>
std::vector<T> along(const Lines& lines, const F& of_channel) {
  std::vector<T> line(lines.width());
  for (int64_t c = 0; c < lines.channels; ++c) line[c] = of_channel(c);
  for (int64_t i = lines.channels; i < lines.width(); ++i) line[i] = line[i - lines.channels];
  return line;
}

// A line at a time: fields are read in the order of memory, which is far faster than several lines side by side.
template <class S, class T>
SIB_CLONES void add_positions(const Lines& lines, const Arguments<S>& in, int64_t begin, int64_t end, const T* mean,
                              const T* rstd, const LineSums<T>& sums) {
  T *sum_v = sums.v, *sum_g = sums.g, *sum_vx = sums.vx, *sum_gx = sums.gx, *sum_vg = sums.vg;
  for (int64_t at = begin * lines.channels; at < end * lines.channels; at += lines.width()) {
    const S *v = in.v + at, *g = in.g + at, *x = in.x + at;
    const int64_t width = std::min(lines.width(), end * lines.channels - at);
    SIB_SIMD
    for (int64_t i = 0; i < width; ++i) {
      const T vi = widen(v[i]), gi = widen(g[i]), xi = (widen(x[i]) - mean[i]) * rstd[i];
      sum_v[i] += vi;
      sum_g[i] += gi;
      sum_vx[i] += vi * xi;
      sum_gx[i] += gi * xi;
      sum_vg[i] += vi * gi;
    }
  }
}

template <class T>
void add_to_channels(const Lines& lines, const LineSums<T>& line, RowSums* sums) {
  for (int64_t first = 0; first < lines.width(); first += lines.channels) {
    for (int64_t c = 0, i = first; c < lines.channels; ++c, ++i) {
      sums[c].v += line.v[i];
      sums[c].g += line.g[i];
      sums[c].vx += line.vx[i];
      sums[c].gx += line.gx[i];
      sums[c].vg += line.vg[i];
    }
  }
}

template <class S, class T>
SIB_CLONES void write_positions(const Lines& lines, const Arguments<S>& in, int64_t begin, int64_t end,
                                const LineCoefficients<T>& k) {
  for (int64_t at = begin * lines.channels; at < end * lines.channels; at += lines.width()) {
    const S *v = in.v + at, *g = in.g + at, *x = in.x + at;
    S *grad_g = in.grad_g + at, *grad_x = in.grad_x + at;
    const int64_t width = std::min(lines.width(), end * lines.channels - at);
    SIB_SIMD
    for (int64_t i = 0; i < width; ++i) {
      const T vi = widen(v[i]), gi = widen(g[i]), xi = (widen(x[i]) - k.mean[i]) * k.rstd[i];
      grad_g[i] = S(k.p_v[i] * vi + k.p_x[i] * xi + k.p_1[i]);
      grad_x[i] = S(k.q_x[i] * xi + k.q_g[i] * gi + k.q_v[i] * vi + k.q_1[i]);
    }
  }
}

// The sums of each part [parts, C].
template <class S, class T>
std::vector<RowSums> part_sums(const Lines& lines, const Arguments<S>& in, const T* mean, const T* rstd) {
  std::vector<RowSums> sums(lines.parts() * lines.channels);
  torch::stable::parallel_for(0, lines.parts(), 1, [&](int64_t first, int64_t last) {
    const int64_t width = lines.width();
    std::vector<T> memory(5 * width);
    T* at = memory.data();
    const LineSums<T> line{at, at + width, at + 2 * width, at + 3 * width, at + 4 * width};
    for (int64_t part = first; part < last; ++part) {
      for (int64_t begin = part * lines.part; begin < lines.end_of(part); begin += kChunk) {
        std::fill(memory.begin(), memory.end(), T(0));
        add_positions(lines, in, begin, std::min(begin + kChunk, lines.end_of(part)), mean, rstd, line);
        add_to_channels(lines, line, sums.data() + part * lines.channels);
      }
    }
  });
  return sums;
}

// The coefficients [C] of the gradients, and the weight's own gradient.
template <class S, class T>
std::vector<RowCoefficients<T>> coefficients(const Lines& lines, const Arguments<S>& in,
                                             const std::vector<RowSums>& parts, T* grad_weight) {
  std::vector<RowCoefficients<T>> result(lines.channels);
  for (int64_t c = 0; c < lines.channels; ++c) {
    RowSums sums;
    for (int64_t part = 0; part < lines.parts(); ++part) {
      const RowSums& more = parts[part * lines.channels + c];
      sums.v += more.v;
      sums.g += more.g;
      sums.vx += more.vx;
      sums.gx += more.gx;
      sums.vg += more.vg;
    }
    const double weight = in.weight ? double(in.weight[c]) : 1.0;
    GroupAverages averages;
    averages.add(sums, weight, static_cast<double>(lines.positions));
    result[c] = row_coefficients<T>(averages, weight, in.rstd[c]);
    grad_weight[c] = static_cast<T>(weight_gradient(averages, sums, in.rstd[c]));
  }
  return result;
}

template <class S>
void run_channels_last(const Normalisation& shape, const Arguments<S>& in, Accumulate<S>* grad_weight) {
  using T = Accumulate<S>;
  const Lines lines(shape);
  const std::vector<T> mean = along<T>(lines, [&](int64_t c) { return in.mean[c]; });
  const std::vector<T> rstd = along<T>(lines, [&](int64_t c) { return in.rstd[c]; });
  const std::vector<RowSums> parts = part_sums<S, T>(lines, in, mean.data(), rstd.data());
  const auto of_channels = coefficients<S, T>(lines, in, parts, grad_weight);
  using K = RowCoefficients<T>;
  std::vector<std::vector<T>> k;
  for (const auto member : {&K::p_v, &K::p_x, &K::p_1, &K::q_x, &K::q_g, &K::q_v, &K::q_1})
    k.push_back(along<T>(lines, [&](int64_t c) { return of_channels[c].*member; }));
  const LineCoefficients<T> line{mean.data(), rstd.data(), k[0].data(), k[1].data(), k[2].data(),
                                 k[3].data(), k[4].data(), k[5].data(), k[6].data()};
  torch::stable::parallel_for(0, lines.parts(), 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part)
      write_positions(lines, in, part * lines.part, lines.end_of(part), line);
  });
}

// ---------------------------------------------------------------------------------------------------- op

// As x, which is channels last; copied if it must be.
Tensor channels_last(const Tensor& t, const Tensor& x) {
  if (is_channels_last(t)) return t;
  Tensor copied = empty_field(x);
  torch::stable::copy_(copied, t);
  return copied;
}

std::tuple<Tensor, Tensor, Tensor> norm_double_backward(const Tensor& grad_grad, const Tensor& grad, const Tensor& input,
                                                        const Tensor& mean, const Tensor& rstd,
                                                        std::optional<Tensor> weight, double) {
  check_like("grad_grad", grad_grad, input);
  const Normalisation shape = check_normalisation(grad, input, mean, rstd, weight);
  const bool last = shape.over_batch && input.dim() == 4 && is_channels_last(input);
  const auto dense = [](const Tensor& t) { return torch::stable::contiguous(t); };
  const auto field = [&](const Tensor& t) { return last ? channels_last(t, input) : dense(t); };
  const Tensor v = field(grad_grad), g = field(grad), x = field(input), m = dense(mean), r = dense(rstd);
  const Tensor w = weight ? dense(*weight) : m;
  const auto empty = [&] { return last ? empty_field(x) : empty_contiguous(x); };
  Tensor grad_g = empty(), grad_x = empty(), grad_weight = empty_dense(m, {shape.channels}, m.scalar_type());
  if (x.numel() == 0) return {grad_g, grad_x, torch::stable::fill_(grad_weight, 0)};
  dispatch_floating("x", x.scalar_type(), [&](auto scalar) {
    using S = decltype(scalar);
    using T = Accumulate<S>;
    const Arguments<S> in{data<S>(v), data<S>(g), data<S>(x), data<T>(m), data<T>(r), weight ? data<T>(w) : nullptr,
                          mutable_data<S>(grad_g), mutable_data<S>(grad_x)};
    const bool along_channels = last || (shape.over_batch && shape.length == 1);  // vectors lie so, too
    (along_channels ? run_channels_last<S> : run<S>)(shape, in, mutable_data<T>(grad_weight));
  });
  if (last) return {grad_g, grad_x, grad_weight};
  return {as_field(grad_g, input), as_field(grad_x, input), grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_ext, CPU, m) {
  m.impl("norm_double_backward", TORCH_BOX(&norm_double_backward));
}

}  // namespace sib_ext
