// The arguments of density_mask, checked the same way for every device.
#pragma once

#include <string>

#include "order_statistics.h"
#include "tensors.h"

namespace sib_ext {

struct Options {
  int64_t C, H, W, radius;
  double temperature, slope, eps, level;
  bool count_padding;
  int64_t support;

  int64_t pixels() const { return H * W; }
  double quantile(int row) const { return row == kRowLow ? kLow : row == kRowHigh ? kHigh : level; }
};

inline Options options_of(const Tensor& R, int64_t window, double temperature, double slope, double eps,
                          const std::string& padding, double area) {
  check_field("vjp", R);
  STD_TORCH_CHECK(window > 0 && window % 2 == 1, "window must be odd and positive, got ", window);
  STD_TORCH_CHECK(temperature > 0, "temperature must be > 0, got ", temperature);
  STD_TORCH_CHECK(padding == "zeros" || padding == "exclude", "padding must be 'zeros' or 'exclude', got '", padding, "'");
  STD_TORCH_CHECK(area > 0 && area < 1, "area must lie between 0 and 1, got ", area);
  Options o{R.size(1), R.size(2), R.size(3), window / 2, temperature, slope, eps, 1 - area, padding == "zeros", 0};
  o.support = support_size(o.pixels(), temperature);
  return o;
}

// What density_mask saved for its backward.
inline void check_saved(const Tensor& grad_mask, const Tensor& vjp, const Tensor& mask, const Tensor& support, const Options& o) {
  check_plane("grad_mask", grad_mask, vjp);
  check_plane("mask", mask, vjp);
  STD_TORCH_CHECK(support.dim() == 3 && support.size(0) == vjp.size(0) && support.size(1) == kRows && support.size(2) == o.support,
                  "support must be the second output of density_mask for the same vjp and options");
}

}  // namespace sib_ext
