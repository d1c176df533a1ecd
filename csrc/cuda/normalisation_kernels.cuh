// norm_double_backward and batch_norm_backward on a GPU: sums of each row, the algebra of each group, the gradients. Both
// read their fields twice. batch_norm_backward (Second = false) is the first gradient of norm_double_backward with the
// layer's own gradient in the place of v: dx = weight rstd (v - avg v - xhat avg(v xhat)).
//
// Contiguous fields: a row is a plane, and a warp has it. Channels last (batch normalisation alone): a row is a part of
// all positions of a channel, and a thread has four neighbouring channels.
#pragma once

#include "../normalisation.h"
#include "common.cuh"

namespace sib_ext::cuda {

constexpr int kNormWarps = 8;  // of a block: rows that it has at a time
constexpr int kNormBlock = kNormWarps * kWarp;

template <class S>
struct NormFields {
  using T = Accumulate<S>;
  const S *v, *g, *x;  // g: of the second derivative alone
  const T *mean, *rstd, *weight;  // weight may be null: all ones
  bool channels_last;
};

template <class S>
struct NormGradients {
  using T = Accumulate<S>;
  S *g, *x;        // x: of the second derivative alone
  T *weight, *bias;  // bias: of the first alone
};

// How fields that are channels last are shared out: a block has a part of the positions and some fours of channels.
struct NormParts {
  int64_t positions, channels, part_positions;
  int across;  // threads side by side, a power of two

  SIB_HOST_DEVICE int64_t tiles() const { return (channels / kVector + across - 1) / across; }
  SIB_HOST_DEVICE int64_t parts() const { return (positions + part_positions - 1) / part_positions; }
};

inline NormParts norm_parts(int64_t positions, int64_t channels, int multiprocessors) {
  NormParts parts{positions, channels, 1, 1};
  while (parts.across < kWarp && parts.across * kVector < channels) parts.across *= 2;
  const int64_t down = kNormBlock / parts.across, wanted = ceil_div(int64_t(4) * multiprocessors, parts.tiles());
  const int64_t least = ceil_div(positions, wanted);
  parts.part_positions = ceil_div(least < 4 * down ? 4 * down : least, down) * down;
  return parts;
}

template <class T, bool Second>
struct Sums {
  T v = 0, g = 0, vx = 0, gx = 0, vg = 0;

  __device__ void add(T of_v, T of_g, T xhat) {
    v += of_v;
    vx += of_v * xhat;
    if constexpr (Second) {
      g += of_g;
      gx += of_g * xhat;
      vg += of_v * of_g;
    }
  }
};

// Four neighbours of v, g and x.
template <class S, bool Second>
struct NormFours {
  Four<S> v, g, x;

  __device__ NormFours(const NormFields<S>& in, int64_t at) : v(*reinterpret_cast<const Four<S>*>(in.v + at)) {
    if constexpr (Second) g = *reinterpret_cast<const Four<S>*>(in.g + at);
    x = *reinterpret_cast<const Four<S>*>(in.x + at);
  }
};

// The gradients at one place.
template <class S, bool Second, class T>
__device__ void norm_gradients(const RowCoefficients<T>& k, T v, T g, T xhat, S& to_g, S& to_x) {
  to_g = narrow<S>(k.p_v * v + k.p_x * xhat + k.p_1);
  if constexpr (Second) to_x = narrow<S>(k.q_x * xhat + k.q_g * g + k.q_v * v + k.q_1);
}

// The row of this warp; there may be none.
__device__ inline int64_t own_row() {
  return static_cast<int64_t>(blockIdx.x) * kNormWarps + threadIdx.x / kWarp;
}

template <class S, bool Second, bool Vector>
__global__ void __launch_bounds__(kNormBlock) norm_sums_kernel(Normalisation shape, NormFields<S> in, RowSums* sums) {
  using T = Accumulate<S>;
  const int64_t row = own_row();
  if (row >= shape.batch * shape.channels) return;  // a whole warp
  const int64_t group = shape.group_of(row), at = row * shape.length;
  const T mean = in.mean[group], rstd = in.rstd[group];
  Sums<T, Second> own;
  const int lane = threadIdx.x % kWarp;
  if constexpr (Vector) {
    for (int64_t i = lane * kVector; i < shape.length; i += kWarp * kVector) {
      const NormFours<S, Second> fours(in, at + i);
#pragma unroll
      for (int k = 0; k < kVector; ++k)
        own.add(widen(fours.v.v[k]), Second ? widen(fours.g.v[k]) : T(0), (widen(fours.x.v[k]) - mean) * rstd);
    }
  } else {
    for (int64_t i = at + lane; i < at + shape.length; i += kWarp)
      own.add(widen(in.v[i]), Second ? widen(in.g[i]) : T(0), (widen(in.x[i]) - mean) * rstd);
  }
  RowSums total;
  total.v = warp_sum(static_cast<double>(own.v));
  total.vx = warp_sum(static_cast<double>(own.vx));
  if constexpr (Second) {
    total.g = warp_sum(static_cast<double>(own.g));
    total.gx = warp_sum(static_cast<double>(own.gx));
    total.vg = warp_sum(static_cast<double>(own.vg));
  }
  if (lane == 0) sums[row] = total;
}

// The four channels and the positions of a thread.
struct NormPlace {
  int64_t part, channel, first, last;
  int step, y, across;

  __device__ explicit NormPlace(const NormParts& parts)
      : part(blockIdx.x / parts.tiles()),
        channel((blockIdx.x % parts.tiles() * parts.across + threadIdx.x % parts.across) * kVector),
        step(kNormBlock / parts.across),
        y(threadIdx.x / parts.across),
        across(parts.across) {
    first = part * parts.part_positions + y;
    last = (part + 1) * parts.part_positions < parts.positions ? (part + 1) * parts.part_positions : parts.positions;
    if (channel >= parts.channels) last = first;
  }
};

template <class S, bool Second>
__global__ void __launch_bounds__(kNormBlock) norm_sums_last_kernel(NormParts parts, NormFields<S> in, RowSums* sums) {
  using T = Accumulate<S>;
  const NormPlace place(parts);
  T mean[kVector] = {}, rstd[kVector] = {};
  if (place.channel < parts.channels) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      mean[k] = in.mean[place.channel + k];
      rstd[k] = in.rstd[place.channel + k];
    }
  }
  Sums<T, Second> own[kVector];
#pragma unroll 2
  for (int64_t p = place.first; p < place.last; p += place.step) {
    const NormFours<S, Second> fours(in, p * parts.channels + place.channel);
#pragma unroll
    for (int k = 0; k < kVector; ++k)
      own[k].add(widen(fours.v.v[k]), Second ? widen(fours.g.v[k]) : T(0), (widen(fours.x.v[k]) - mean[k]) * rstd[k]);
  }
  // The threads below each other, one sum after the other.
  T* scratch = reinterpret_cast<T*>(block_memory());
  const int column = threadIdx.x % place.across * kVector, width = place.across * kVector;
  const int64_t channel = blockIdx.x % parts.tiles() * width + threadIdx.x;
  const bool sums_up = static_cast<int>(threadIdx.x) < width && channel < parts.channels;
  RowSums total;
  const auto gather = [&](T Sums<T, Second>::* sum, double RowSums::* into) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kVector; ++k) scratch[place.y * width + column + k] = own[k].*sum;
    __syncthreads();
    if (!sums_up) return;
    for (int y = 0; y < place.step; ++y) total.*into += static_cast<double>(scratch[y * width + threadIdx.x]);
  };
  gather(&Sums<T, Second>::v, &RowSums::v);
  gather(&Sums<T, Second>::vx, &RowSums::vx);
  if constexpr (Second) {
    gather(&Sums<T, Second>::g, &RowSums::g);
    gather(&Sums<T, Second>::gx, &RowSums::gx);
    gather(&Sums<T, Second>::vg, &RowSums::vg);
  }
  if (sums_up) sums[place.part * parts.channels + channel] = total;
}

// A warp has a group, of whose values each is the given share: its rows' coefficients, and their parts of the weights'
// gradients; of a first derivative the gradients of weight and bias themselves.
template <class S, bool Second>
__global__ void __launch_bounds__(kNormBlock)
    norm_groups_kernel(Normalisation shape, double share, NormFields<S> in, const RowSums* sums,
                       RowCoefficients<Accumulate<S>>* coefficients, double* weight_parts, NormGradients<S> grad) {
  const int64_t group = own_row();
  if (group >= shape.group_count()) return;
  const int lane = threadIdx.x % kWarp;
  const auto weight = [&](int64_t row) { return in.weight ? double(in.weight[shape.channel(group, row)]) : 1.0; };
  GroupAverages own, mean;  // sums at first
  for (int64_t row = lane; row < shape.rows(); row += kWarp) own.add(sums[shape.place(group, row)], weight(row), 1.0);
  const auto over_group = [&](double value) { return __shfl_sync(kAllLanes, warp_sum(value), 0); };
  mean.v = over_group(own.v);
  mean.vx = over_group(own.vx);
  if constexpr (Second) {
    mean.h = over_group(own.h) * share;
    mean.hx = over_group(own.hx) * share;
    mean.vh = over_group(own.vh) * share;
  } else if (lane == 0) {
    grad.weight[group] = static_cast<Accumulate<S>>(mean.vx);
    grad.bias[group] = static_cast<Accumulate<S>>(mean.v);
  }
  mean.v *= share;
  mean.vx *= share;
  const double rstd = in.rstd[group];
  for (int64_t row = lane; row < shape.rows(); row += kWarp) {
    const int64_t place = shape.place(group, row);
    coefficients[place] = row_coefficients<Accumulate<S>>(mean, weight(row), rstd);
    if constexpr (Second) weight_parts[place] = weight_gradient(mean, sums[place], rstd);
  }
}

// A warp has a channel: the sum over its rows.
template <class T>
__global__ void __launch_bounds__(kNormBlock) norm_weights_kernel(Normalisation shape, const double* parts, T* grad_weight) {
  const int64_t channel = own_row();
  if (channel >= shape.channels) return;
  double total = 0;
  for (int64_t b = threadIdx.x % kWarp; b < shape.batch; b += kWarp) total += parts[b * shape.channels + channel];
  total = warp_sum(total);
  if (threadIdx.x % kWarp == 0) grad_weight[channel] = static_cast<T>(total);
}

template <class S, bool Second, bool Vector>
__global__ void __launch_bounds__(kNormBlock)
    norm_write_kernel(Normalisation shape, NormFields<S> in, const RowCoefficients<Accumulate<S>>* coefficients,
                      NormGradients<S> grad) {
  using T = Accumulate<S>;
  const int64_t row = own_row();
  if (row >= shape.batch * shape.channels) return;
  const int64_t group = shape.group_of(row), at = row * shape.length;
  const T mean = in.mean[group], rstd = in.rstd[group];
  const RowCoefficients<T> k = coefficients[row];
  const int lane = threadIdx.x % kWarp;
  if constexpr (Vector) {
    for (int64_t i = lane * kVector; i < shape.length; i += kWarp * kVector) {
      const NormFours<S, Second> fours(in, at + i);
      Four<S> to_g, to_x;
#pragma unroll
      for (int j = 0; j < kVector; ++j)
        norm_gradients<S, Second>(k, widen(fours.v.v[j]), Second ? widen(fours.g.v[j]) : T(0),
                                  (widen(fours.x.v[j]) - mean) * rstd, to_g.v[j], to_x.v[j]);
      *reinterpret_cast<Four<S>*>(grad.g + at + i) = to_g;
      if constexpr (Second) *reinterpret_cast<Four<S>*>(grad.x + at + i) = to_x;
    }
  } else {
    for (int64_t i = at + lane; i < at + shape.length; i += kWarp) {
      S to_g, to_x;
      norm_gradients<S, Second>(k, widen(in.v[i]), Second ? widen(in.g[i]) : T(0), (widen(in.x[i]) - mean) * rstd, to_g, to_x);
      grad.g[i] = to_g;
      if constexpr (Second) grad.x[i] = to_x;
    }
  }
}

template <class S, bool Second>
__global__ void __launch_bounds__(kNormBlock)
    norm_write_last_kernel(NormParts parts, NormFields<S> in, const RowCoefficients<Accumulate<S>>* coefficients,
                           NormGradients<S> grad) {
  using T = Accumulate<S>;
  const NormPlace place(parts);
  if (place.channel >= parts.channels) return;
  T mean[kVector], rstd[kVector];
  RowCoefficients<T> k[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    mean[j] = in.mean[place.channel + j];
    rstd[j] = in.rstd[place.channel + j];
    k[j] = coefficients[place.channel + j];
  }
  for (int64_t p = place.first; p < place.last; p += place.step) {
    const int64_t at = p * parts.channels + place.channel;
    const NormFours<S, Second> fours(in, at);
    Four<S> to_g, to_x;
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      norm_gradients<S, Second>(k[j], widen(fours.v.v[j]), Second ? widen(fours.g.v[j]) : T(0),
                                (widen(fours.x.v[j]) - mean[j]) * rstd[j], to_g.v[j], to_x.v[j]);
    *reinterpret_cast<Four<S>*>(grad.g + at) = to_g;
    if constexpr (Second) *reinterpret_cast<Four<S>*>(grad.x + at) = to_x;
  }
}

template <class S, bool Second>
void norm_backward(const Normalisation& shape, const NormFields<S>& in, const NormGradients<S>& grad, const Device& device) {
  using T = Accumulate<S>;
  const auto blocks = [](int64_t warps) { return ceil_div(warps, kNormWarps); };
  NormParts parts{};
  Normalisation rows = shape;  // what a row is: see above
  if (in.channels_last) {
    parts = norm_parts(shape.batch * shape.length, shape.channels, device.multiprocessors);
    rows.batch = parts.parts();
  }
  const double share = 1 / (static_cast<double>(shape.rows()) * static_cast<double>(shape.length));
  const int64_t all = rows.batch * rows.channels;
  RowSums* sums = device.array<RowSums>(all);
  auto* coefficients = device.array<RowCoefficients<T>>(all);
  double* weight_parts = Second ? device.array<double>(all) : nullptr;
  bool vector = !in.channels_last;
  for (const void* pointer : {static_cast<const void*>(in.v), static_cast<const void*>(in.g), static_cast<const void*>(in.x),
                              static_cast<const void*>(grad.g), static_cast<const void*>(grad.x)})
    vector = vector && vectorisable(pointer, shape.length, sizeof(S));
  const auto contiguous = [&](auto kernel, auto in_fours, auto... arguments) {
    launch(device, vector ? in_fours : kernel, blocks(all), kNormBlock, 0, shape, in, arguments...);
  };
  const auto last = [&](auto kernel, int64_t shared_bytes, auto... arguments) {
    launch(device, kernel, parts.parts() * parts.tiles(), kNormBlock, shared_bytes, parts, in, arguments...);
  };
  if (in.channels_last) {
    last(norm_sums_last_kernel<S, Second>, kNormBlock * kVector * sizeof(T), sums);
  } else {
    contiguous(norm_sums_kernel<S, Second, false>, norm_sums_kernel<S, Second, true>, sums);
  }
  launch(device, norm_groups_kernel<S, Second>, blocks(rows.group_count()), kNormBlock, 0, rows, share, in, sums, coefficients,
         weight_parts, grad);
  if constexpr (Second)
    launch(device, norm_weights_kernel<T>, blocks(rows.channels), kNormBlock, 0, rows, weight_parts, grad.weight);
  if (in.channels_last) {
    last(norm_write_last_kernel<S, Second>, 0, coefficients, grad);
  } else {
    contiguous(norm_write_kernel<S, Second, false>, norm_write_kernel<S, Second, true>, coefficients, grad);
  }
}

}  // namespace sib_ext::cuda
