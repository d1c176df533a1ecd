// What the ops of normalisation share on a GPU between torch's tensors and the kernels: the layout they work in.
#pragma once

#include "tensors.cuh"

#include "../check_normalisation.h"
#include "normalisation_kernels.cuh"

namespace sib_ext::cuda {

inline void check_device(const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.get_device_index() == x.get_device_index(), "all arguments must be on the device of x");
}

// Channels last where x is and the kernels take it; else contiguous. What lies otherwise is copied.
class NormLayout {
 public:
  NormLayout(const Tensor& x, const Normalisation& shape)
      : x_(x), channels_last_(shape.over_batch && shape.channels % kVector == 0 && x.dim() == 4 && is_channels_last(x) &&
                              aligned(x)) {}

  bool channels_last() const { return channels_last_; }

  Tensor of(const Tensor& t) const {
    if (!channels_last_) return torch::stable::contiguous(t);
    if (is_channels_last(t) && aligned(t)) return t;
    Tensor copied = empty();
    torch::stable::copy_(copied, t);
    return copied;
  }

  // Uninitialised, with the size and type of x.
  Tensor empty() const { return channels_last_ ? empty_field(x_) : empty_contiguous(x_); }

  // An output in the memory format of x.
  Tensor as_input(const Tensor& t) const { return channels_last_ ? t : as_field(t, x_); }

 private:
  static bool aligned(const Tensor& t) {
    return vectorisable(t.data_ptr(), kVector, t.element_size());
  }

  const Tensor& x_;
  bool channels_last_;
};

}  // namespace sib_ext::cuda
