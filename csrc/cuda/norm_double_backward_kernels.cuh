// norm_double_backward on a GPU: sums of each row, the algebra of each group, both gradients. A warp has a row.
#pragma once

#include "../normalisation.h"
#include "common.cuh"

namespace sib_ext::cuda {

constexpr int kNormWarps = 8;  // of a block: rows that it has at a time

template <class S>
struct NormFields {
  using T = Accumulate<S>;
  const S *v, *g, *x;
  const T *mean, *rstd, *weight;  // weight may be null: all ones
  bool vector;                    // four neighbours can be loaded and stored at once
};

template <class S>
struct NormGradients {
  S *g, *x;
  Accumulate<S>* weight;
};

// The row of this warp; there may be none.
__device__ inline int64_t own_row() {
  return static_cast<int64_t>(blockIdx.x) * kNormWarps + threadIdx.x / kWarp;
}

template <class S>
__global__ void __launch_bounds__(kNormWarps* kWarp) norm_sums_kernel(Normalisation shape, NormFields<S> in, RowSums* sums) {
  using T = Accumulate<S>;
  const int64_t row = own_row();
  if (row >= shape.batch * shape.channels) return;  // a whole warp
  const int64_t group = shape.group_of(row), at = row * shape.length;
  const T mean = in.mean[group], rstd = in.rstd[group];
  T v = 0, g = 0, vx = 0, gx = 0, vg = 0;
  const auto add = [&](S raw_v, S raw_g, S raw_x) {
    const T vi = widen(raw_v), gi = widen(raw_g), xi = (widen(raw_x) - mean) * rstd;
    v += vi;
    g += gi;
    vx += vi * xi;
    gx += gi * xi;
    vg += vi * gi;
  };
  const int lane = threadIdx.x % kWarp;
  if (in.vector) {
    for (int64_t i = lane * kVector; i < shape.length; i += kWarp * kVector) {
      const Four<S> fours[3] = {*reinterpret_cast<const Four<S>*>(in.v + at + i),
                                *reinterpret_cast<const Four<S>*>(in.g + at + i),
                                *reinterpret_cast<const Four<S>*>(in.x + at + i)};
#pragma unroll
      for (int k = 0; k < kVector; ++k) add(fours[0].v[k], fours[1].v[k], fours[2].v[k]);
    }
  } else {
    for (int64_t i = lane; i < shape.length; i += kWarp) add(in.v[at + i], in.g[at + i], in.x[at + i]);
  }
  RowSums total;
  total.v = warp_sum(static_cast<double>(v));
  total.g = warp_sum(static_cast<double>(g));
  total.vx = warp_sum(static_cast<double>(vx));
  total.gx = warp_sum(static_cast<double>(gx));
  total.vg = warp_sum(static_cast<double>(vg));
  if (lane == 0) sums[row] = total;
}

// A warp has a group: its rows' coefficients, and their parts of the weights' gradients.
template <class S>
__global__ void __launch_bounds__(kNormWarps* kWarp)
    norm_groups_kernel(Normalisation shape, NormFields<S> in, const RowSums* sums, RowCoefficients<Accumulate<S>>* coefficients,
                       double* weight_parts) {
  const int64_t group = own_row();
  if (group >= shape.group_count()) return;
  const int lane = threadIdx.x % kWarp;
  const double count = static_cast<double>(shape.rows()) * static_cast<double>(shape.length);
  const auto weight = [&](int64_t row) { return in.weight ? double(in.weight[shape.channel(group, row)]) : 1.0; };
  GroupAverages own;
  for (int64_t row = lane; row < shape.rows(); row += kWarp) own.add(sums[shape.place(group, row)], weight(row), count);
  GroupAverages mean;
  mean.v = __shfl_sync(kAllLanes, warp_sum(own.v), 0);
  mean.h = __shfl_sync(kAllLanes, warp_sum(own.h), 0);
  mean.hx = __shfl_sync(kAllLanes, warp_sum(own.hx), 0);
  mean.vx = __shfl_sync(kAllLanes, warp_sum(own.vx), 0);
  mean.vh = __shfl_sync(kAllLanes, warp_sum(own.vh), 0);
  const double rstd = in.rstd[group];
  for (int64_t row = lane; row < shape.rows(); row += kWarp) {
    const int64_t place = shape.place(group, row);
    coefficients[place] = row_coefficients<Accumulate<S>>(mean, weight(row), rstd);
    weight_parts[place] = weight_gradient(mean, sums[place], rstd);
  }
}

// A warp has a channel: the sum over the batch.
template <class T>
__global__ void __launch_bounds__(kNormWarps* kWarp) norm_weights_kernel(Normalisation shape, const double* parts, T* grad_weight) {
  const int64_t channel = own_row();
  if (channel >= shape.channels) return;
  double total = 0;
  for (int64_t b = threadIdx.x % kWarp; b < shape.batch; b += kWarp) total += parts[b * shape.channels + channel];
  total = warp_sum(total);
  if (threadIdx.x % kWarp == 0) grad_weight[channel] = static_cast<T>(total);
}

template <class S>
__global__ void __launch_bounds__(kNormWarps* kWarp)
    norm_write_kernel(Normalisation shape, NormFields<S> in, const RowCoefficients<Accumulate<S>>* coefficients, S* grad_g, S* grad_x) {
  using T = Accumulate<S>;
  const int64_t row = own_row();
  if (row >= shape.batch * shape.channels) return;
  const int64_t group = shape.group_of(row), at = row * shape.length;
  const T mean = in.mean[group], rstd = in.rstd[group];
  const RowCoefficients<T> k = coefficients[row];
  const auto write = [&](S raw_v, S raw_g, S raw_x, S& to_g, S& to_x) {
    const T vi = widen(raw_v), gi = widen(raw_g), xi = (widen(raw_x) - mean) * rstd;
    to_g = narrow<S>(k.p_v * vi + k.p_x * xi + k.p_1);
    to_x = narrow<S>(k.q_x * xi + k.q_g * gi + k.q_v * vi + k.q_1);
  };
  const int lane = threadIdx.x % kWarp;
  if (in.vector) {
    for (int64_t i = lane * kVector; i < shape.length; i += kWarp * kVector) {
      const Four<S> fours[3] = {*reinterpret_cast<const Four<S>*>(in.v + at + i),
                                *reinterpret_cast<const Four<S>*>(in.g + at + i),
                                *reinterpret_cast<const Four<S>*>(in.x + at + i)};
      Four<S> to_g, to_x;
#pragma unroll
      for (int j = 0; j < kVector; ++j) write(fours[0].v[j], fours[1].v[j], fours[2].v[j], to_g.v[j], to_x.v[j]);
      *reinterpret_cast<Four<S>*>(grad_g + at + i) = to_g;
      *reinterpret_cast<Four<S>*>(grad_x + at + i) = to_x;
    }
    return;
  }
  for (int64_t i = lane; i < shape.length; i += kWarp)
    write(in.v[at + i], in.g[at + i], in.x[at + i], grad_g[at + i], grad_x[at + i]);
}

template <class S>
void norm_second(const Normalisation& shape, NormFields<S> in, const NormGradients<S>& grad, const Device& device) {
  using T = Accumulate<S>;
  const int64_t rows = shape.batch * shape.channels;
  in.vector = true;
  for (const void* pointer : {static_cast<const void*>(in.v), static_cast<const void*>(in.g), static_cast<const void*>(in.x),
                              static_cast<const void*>(grad.g), static_cast<const void*>(grad.x)})
    in.vector = in.vector && vectorisable(pointer, shape.length, sizeof(S));
  RowSums* sums = device.array<RowSums>(rows);
  auto* coefficients = device.array<RowCoefficients<T>>(rows);
  double* parts = device.array<double>(rows);
  const auto blocks = [](int64_t warps) { return ceil_div(warps, kNormWarps); };
  const int threads = kNormWarps * kWarp;
  launch(device, norm_sums_kernel<S>, blocks(rows), threads, 0, shape, in, sums);
  launch(device, norm_groups_kernel<S>, blocks(shape.group_count()), threads, 0, shape, in, sums, coefficients, parts);
  launch(device, norm_weights_kernel<T>, blocks(shape.channels), threads, 0, shape, parts, grad.weight);
  launch(device, norm_write_kernel<S>, blocks(rows), threads, 0, shape, in, coefficients, grad.g, grad.x);
}

}  // namespace sib_ext::cuda
