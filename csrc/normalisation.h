// What the kernels of norm_double_backward and batch_norm_backward share on every device: rows, groups, and the algebra
// between two passes.
//
// A group is what is normalised together: a channel of the whole batch, or some channels of one sample. Its rows are
// the planes of its channels (on a GPU, of fields that are channels last: parts of all positions of a channel).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace sib_ext {

struct Normalisation {
  int64_t batch, channels, groups, length;  // groups: statistics of a sample, or channels if over_batch
  bool over_batch;

  SIB_HOST_DEVICE int64_t group_count() const { return over_batch ? groups : batch * groups; }
  SIB_HOST_DEVICE int64_t rows() const { return over_batch ? batch : channels / groups; }
  SIB_HOST_DEVICE int64_t channel(int64_t group, int64_t row) const {
    return over_batch ? group : group % groups * rows() + row;
  }
  // The number of a group's row among all rows [batch, channels].
  SIB_HOST_DEVICE int64_t place(int64_t group, int64_t row) const {
    return (over_batch ? row : group / groups) * channels + channel(group, row);
  }
  SIB_HOST_DEVICE int64_t group_of(int64_t place) const {
    return over_batch ? place % channels : place / channels * groups + place % channels / (channels / groups);
  }
};

// Sums over a row of v (the cotangent), g (the gradient), xhat = (x - mean) rstd and their products.
struct RowSums {
  double v = 0, g = 0, vx = 0, gx = 0, vg = 0;
};

// Averages over a group, with h = weight g.
struct GroupAverages {
  double v = 0, h = 0, hx = 0, vx = 0, vh = 0;

  SIB_HOST_DEVICE void add(const RowSums& sums, double weight, double count) {
    v += sums.v / count;
    h += weight * sums.g / count;
    hx += weight * sums.gx / count;
    vx += sums.vx / count;
    vh += weight * sums.vg / count;
  }
};

// grad_g = p_v v + p_x xhat + p_1 and grad_x = q_x xhat + q_g g + q_v v + q_1.
template <class T>
struct RowCoefficients {
  T p_v, p_x, p_1, q_x, q_g, q_v, q_1;
};

template <class T>
SIB_HOST_DEVICE RowCoefficients<T> row_coefficients(const GroupAverages& mean, double weight, double r) {
  const double a = mean.hx, b = mean.vx, square = r * r;
  return {T(weight * r),
          T(-weight * r * b),
          T(-weight * r * mean.v),
          T(-square * (mean.vh - mean.v * mean.h - 3 * a * b)),
          T(-square * b * weight),
          T(-square * a),
          T(square * (b * mean.h + a * mean.v))};
}

// A row's part of the gradient of its channel's weight.
SIB_HOST_DEVICE inline double weight_gradient(const GroupAverages& mean, const RowSums& sums, double r) {
  return r * (sums.vg - mean.v * sums.g - mean.vx * sums.gx);
}

}  // namespace sib_ext
