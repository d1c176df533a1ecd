// The arguments of norm_double_backward and batch_norm_backward, checked the same way for every device.
#pragma once

#include <optional>

#include "normalisation.h"
#include "tensors.h"

namespace sib_ext {

inline void check_like(const char* name, const Tensor& t, const Tensor& x) {
  bool same = t.dim() == x.dim();
  for (int64_t dim = 0; same && dim < x.dim(); ++dim) same = t.size(dim) == x.size(dim);
  STD_TORCH_CHECK(same, name, " must have the size of x");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the type of x");
}

inline Normalisation check_normalisation(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                         const std::optional<Tensor>& weight) {
  STD_TORCH_CHECK(x.dim() >= 2, "x must be [B,C,...], got ", x.dim(), " dimensions");
  check_like("grad", grad, x);
  const int64_t batch = x.size(0), channels = x.size(1);
  STD_TORCH_CHECK(mean.dim() == 1 || mean.dim() == 2, "mean must be [C] or [B,G], got ", mean.dim(), " dimensions");
  const bool over_batch = mean.dim() == 1;
  const int64_t groups = mean.size(mean.dim() - 1);
  STD_TORCH_CHECK(over_batch ? groups == channels : mean.size(0) == batch && groups > 0 && channels % groups == 0,
                  "mean must be [C] (batch normalisation) or [B,G] with G a divisor of C (group normalisation)");
  const ScalarType type = accumulation_type(x.scalar_type());
  STD_TORCH_CHECK(mean.numel() == rstd.numel() && mean.scalar_type() == type && rstd.scalar_type() == type,
                  "mean and rstd must have one size and the accumulation type of x");
  if (weight) {
    STD_TORCH_CHECK(weight->numel() == channels && weight->scalar_type() == type,
                    "weight must be [C] in the accumulation type of x");
  }
  const int64_t rows = batch * channels;
  return {batch, channels, groups, rows > 0 ? x.numel() / rows : 0, over_batch};
}

// A contiguous tensor in the memory format of x.
inline Tensor as_field(const Tensor& contiguous, const Tensor& x) {
  if (x.dim() != 4 || !is_channels_last(x)) return contiguous;
  Tensor field = empty_field(x);
  torch::stable::copy_(field, contiguous);
  return field;
}

// Contiguous, uninitialised, as x.
inline Tensor empty_contiguous(const Tensor& x) {
  return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device());
}

}  // namespace sib_ext
