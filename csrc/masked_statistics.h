// The arguments of masked_statistics, checked the same way for every device.
#pragma once

#include "moments.h"
#include "tensors.h"

namespace sib_ext {

inline void check_inputs(const Tensor& R, const Tensor& x, const Tensor& M) {
  check_field("vjp", R);
  check_field("x", x);
  for (int dim = 0; dim < 4; ++dim) STD_TORCH_CHECK(R.size(dim) == x.size(dim), "x must have the size of vjp");
  STD_TORCH_CHECK(R.scalar_type() == x.scalar_type(), "x must have the type of vjp");
  check_plane("mask", M, R);
}

inline void check_cotangent(const char* name, const Tensor& g, int64_t rows, int64_t columns, const Tensor& R) {
  STD_TORCH_CHECK(g.dim() == 2 && g.size(0) == rows && g.size(1) == columns && g.scalar_type() == accumulation_type(R.scalar_type()),
                  name, " must be [", rows, ",", columns, "] in the type of the forward's output");
}

}  // namespace sib_ext
