// The op norm_double_backward on a GPU: checks, memory and types; kernels in normalisation_kernels.cuh.

#include "normalisation_tensors.cuh"

#include <tuple>

namespace sib_ext::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> norm_double_backward(const Tensor& grad_grad, const Tensor& grad, const Tensor& input,
                                                        const Tensor& mean, const Tensor& rstd,
                                                        std::optional<Tensor> weight, double) {
  check_like("grad_grad", grad_grad, input);
  const Normalisation shape = check_normalisation(grad, input, mean, rstd, weight);
  for (const Tensor* t : {&grad_grad, &grad, &mean, &rstd, weight ? &*weight : &rstd}) check_device(*t, input);
  const Call call(input);
  const NormLayout layout(input, shape);
  const Tensor v = layout.of(grad_grad), g = layout.of(grad), x = layout.of(input);
  const Tensor m = torch::stable::contiguous(mean), r = torch::stable::contiguous(rstd);
  const Tensor w = weight ? torch::stable::contiguous(*weight) : m;
  Tensor grad_g = layout.empty(), grad_x = layout.empty(), grad_weight = empty_dense(m, {shape.channels}, m.scalar_type());
  if (x.numel() == 0) return {grad_g, grad_x, torch::stable::fill_(grad_weight, 0)};
  dispatch_floating("x", x.scalar_type(), [&](auto scalar) {
    using S = typename OnDevice<decltype(scalar)>::Type;
    using T = Accumulate<S>;
    const NormFields<S> fields{data<S>(v), data<S>(g), data<S>(x), data<T>(m), data<T>(r), weight ? data<T>(w) : nullptr,
                               layout.channels_last()};
    norm_backward<S, true>(shape, fields,
                           {mutable_data<S>(grad_g), mutable_data<S>(grad_x), mutable_data<T>(grad_weight), nullptr},
                           call.device());
  });
  return {layout.as_input(grad_g), layout.as_input(grad_x), grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_ext, CUDA, m) {
  m.impl("norm_double_backward", TORCH_BOX(&norm_double_backward));
}

}  // namespace sib_ext::cuda
