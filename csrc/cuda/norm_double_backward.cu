// The op norm_double_backward on a GPU: checks, memory and types; kernels in norm_double_backward_kernels.cuh.

#include "tensors.cuh"

#include <tuple>

#include "../norm_double_backward.h"
#include "norm_double_backward_kernels.cuh"

namespace sib_ext::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> norm_double_backward(const Tensor& grad_grad, const Tensor& grad, const Tensor& input,
                                                        const Tensor& mean, const Tensor& rstd,
                                                        std::optional<Tensor> weight, double) {
  const Normalisation shape = check_normalisation(grad_grad, grad, input, mean, rstd, weight);
  for (const Tensor* t : {&grad_grad, &grad, &mean, &rstd, weight ? &*weight : &rstd})
    STD_TORCH_CHECK(t->get_device_index() == input.get_device_index(), "all arguments must be on the device of x");
  const Call call(input);
  const auto dense = [](const Tensor& t) { return torch::stable::contiguous(t); };
  const Tensor v = dense(grad_grad), g = dense(grad), x = dense(input), m = dense(mean), r = dense(rstd);
  const Tensor w = weight ? dense(*weight) : m;
  Tensor grad_g = empty_contiguous(x), grad_x = empty_contiguous(x), grad_weight = empty_dense(m, {shape.channels}, m.scalar_type());
  if (x.numel() == 0) return {grad_g, grad_x, torch::stable::fill_(grad_weight, 0)};
  dispatch_floating("x", x.scalar_type(), [&](auto scalar) {
    using S = typename OnDevice<decltype(scalar)>::Type;
    using T = Accumulate<S>;
    const NormFields<S> fields{data<S>(v), data<S>(g), data<S>(x), data<T>(m), data<T>(r), weight ? data<T>(w) : nullptr, false};
    const NormGradients<S> gradients{mutable_data<S>(grad_g), mutable_data<S>(grad_x), mutable_data<T>(grad_weight)};
    norm_second(shape, fields, gradients, call.device());
  });
  return {grad_g, grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_ext, CUDA, m) {
  m.impl("norm_double_backward", TORCH_BOX(&norm_double_backward));
}

}  // namespace sib_ext::cuda
