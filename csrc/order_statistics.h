// The soft quantile's arithmetic, shared by every kernel; sib_ext/reference.py has the same formulas by the same names.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace sib_ext {

// Published normalisation of the density: its 5 % and 95 % soft quantiles.
constexpr double kLow = 0.05, kHigh = 0.95;
// exp(-40) = 4e-18: a position further than 40 temperatures from the nearest one weighs nothing, even in float64.
constexpr double kSupportRadius = 40.0;
// A position on the very edge of the support is inside, whatever the rounding (or fused multiply-add) of the compiler.
constexpr double kEdge = 1e-9;
// The rows of the saved support: q05(g), q95(g), q80(g), q80(d).
enum Row { kRowLow, kRowHigh, kRowLevel, kRowAverage, kRows };

// How many order statistics carry weight in a soft quantile of n values; n when the temperature is wide.
inline int64_t support_size(int64_t n, double temperature) {
  const double size = std::floor(2 * (kSupportRadius * temperature + 0.5) + kEdge) + 1;
  return size < static_cast<double>(n) ? static_cast<int64_t>(size) : n;
}

// The first sorted position of the support.
inline int64_t support_start(int64_t n, double q, double temperature, int64_t size) {
  const double first = std::ceil(q * (n - 1) - (kSupportRadius * temperature + 0.5) - kEdge);
  return static_cast<int64_t>(std::clamp(first, 0.0, static_cast<double>(n - size)));
}

// A soft quantile of n sorted values: sum_k weight(k) v_(start + k), weights softmax_i(-|i - q(n-1)|/temperature).
struct SoftQuantile {
  double target, temperature, nearest, total;
  int64_t start, size;

  SIB_HOST_DEVICE double unscaled_weight(int64_t k) const {
    return std::exp((nearest - std::abs(start + k - target)) / temperature);
  }
  SIB_HOST_DEVICE double weight(int64_t k) const { return unscaled_weight(k) / total; }
};

inline SoftQuantile soft_quantile(int64_t n, double q, double temperature, int64_t size) {
  SoftQuantile s{q * (n - 1), temperature, HUGE_VAL, 0, support_start(n, q, temperature, size), size};
  for (int64_t k = 0; k < size; ++k) s.nearest = std::min(s.nearest, std::abs(s.start + k - s.target));
  for (int64_t k = 0; k < size; ++k) s.total += s.unscaled_weight(k);
  return s;
}

template <class T>
void support_weights(int64_t n, double q, double temperature, int64_t size, T* weights) {
  const SoftQuantile s = soft_quantile(n, q, temperature, size);
  for (int64_t k = 0; k < size; ++k) weights[k] = static_cast<T>(s.weight(k));
}

}  // namespace sib_ext
