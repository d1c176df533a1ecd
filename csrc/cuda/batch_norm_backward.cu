// The op batch_norm_backward on a GPU: checks, memory and types; kernels in normalisation_kernels.cuh.

#include "normalisation_tensors.cuh"

#include <tuple>

namespace sib_ext::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad, const Tensor& input, const Tensor& mean,
                                                       const Tensor& rstd, std::optional<Tensor> weight) {
  const Normalisation shape = check_normalisation(grad, input, mean, rstd, weight);
  STD_TORCH_CHECK(shape.over_batch, "mean must be [C]: batch normalisation alone");
  for (const Tensor* t : {&grad, &mean, &rstd, weight ? &*weight : &rstd}) check_device(*t, input);
  const Call call(input);
  const NormLayout layout(input, shape);
  const Tensor v = layout.of(grad), x = layout.of(input);
  const Tensor m = torch::stable::contiguous(mean), r = torch::stable::contiguous(rstd);
  const Tensor w = weight ? torch::stable::contiguous(*weight) : m;
  Tensor grad_x = layout.empty(), grad_weight = empty_dense(m, {shape.channels}, m.scalar_type());
  Tensor grad_bias = empty_dense(m, {shape.channels}, m.scalar_type());
  if (x.numel() == 0) return {grad_x, torch::stable::fill_(grad_weight, 0), torch::stable::fill_(grad_bias, 0)};
  dispatch_floating("x", x.scalar_type(), [&](auto scalar) {
    using S = typename OnDevice<decltype(scalar)>::Type;
    using T = Accumulate<S>;
    const NormFields<S> fields{data<S>(v), nullptr, data<S>(x), data<T>(m), data<T>(r), weight ? data<T>(w) : nullptr,
                               layout.channels_last()};
    norm_backward<S, false>(shape, fields,
                            {mutable_data<S>(grad_x), nullptr, mutable_data<T>(grad_weight), mutable_data<T>(grad_bias)},
                            call.device());
  });
  return {layout.as_input(grad_x), grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_ext, CUDA, m) {
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
}

}  // namespace sib_ext::cuda
