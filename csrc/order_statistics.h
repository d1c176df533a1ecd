// The soft quantile's arithmetic, shared by every kernel; sib_ext/reference.py has the same formulas by the same names.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

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

// softmax_i(-|i - q(n-1)|/temperature) on the support.
template <class T>
void support_weights(int64_t n, double q, double temperature, int64_t size, T* weights) {
  const double target = q * (n - 1);
  const int64_t start = support_start(n, q, temperature, size);
  double nearest = HUGE_VAL, total = 0;
  for (int64_t k = 0; k < size; ++k) nearest = std::min(nearest, std::abs(start + k - target));
  for (int64_t k = 0; k < size; ++k) total += std::exp((nearest - std::abs(start + k - target)) / temperature);
  for (int64_t k = 0; k < size; ++k)
    weights[k] = static_cast<T>(std::exp((nearest - std::abs(start + k - target)) / temperature) / total);
}

}  // namespace sib_ext
