// The op masked_statistics on a GPU: checks, memory and types; the kernels are in masked_statistics_kernels.cuh.

#include "tensors.cuh"

#include <optional>
#include <tuple>

#include "../masked_statistics.h"
#include "masked_statistics_kernels.cuh"

namespace sib_ext::cuda {
namespace {

void check_all(const Tensor& R, const Tensor& x, const Tensor& M) {
  check_inputs(R, x, M);
  check_plane_size(R);
  check_same_device("x", x, R);
  check_same_device("mask", M, R);
}

template <class S>
Fields<S> fields_of(const Tensor& R, const Tensor& x, const Tensor& M) {
  return make_fields(data<S>(R), data<S>(x), data<Accumulate<S>>(M), layout_of(R), layout_of(x), R.size(0),
                     static_cast<int>(R.size(1)), R.size(2) * R.size(3));
}

std::tuple<Tensor, Tensor, Tensor> masked_statistics(const Tensor& vjp, const Tensor& input, const Tensor& mask,
                                                     bool gram_vjp, bool gram_input) {
  check_all(vjp, input, mask);
  const Call call(vjp);
  const Tensor R = canonical(vjp), x = canonical(input), M = torch::stable::contiguous(mask);
  const int64_t B = R.size(0);
  const ScalarType type = accumulation_type(R.scalar_type());
  Tensor moments = empty_dense(R, {B, kMoments}, type);
  Tensor gram_a = empty_dense(R, {gram_vjp ? B : 0, gram_vjp ? B : 0}, type);
  Tensor gram_b = empty_dense(R, {gram_input ? B : 0, gram_input ? B : 0}, type);
  dispatch_floating("vjp", R.scalar_type(), [&](auto scalar) {
    using S = typename OnDevice<decltype(scalar)>::Type;
    using T = Accumulate<S>;
    statistics_forward(fields_of<S>(R, x, M), call.device(), mutable_data<T>(moments),
                       gram_vjp ? mutable_data<T>(gram_a) : nullptr, gram_input ? mutable_data<T>(gram_b) : nullptr);
  });
  return {moments, gram_a, gram_b};
}

// A Gram's cotangent, if there is one, in memory order.
std::optional<Tensor> dense(const char* name, const std::optional<Tensor>& cotangent, const Tensor& vjp) {
  if (!cotangent.has_value()) return std::nullopt;
  check_cotangent(name, *cotangent, vjp.size(0), vjp.size(0), vjp);
  check_same_device(name, *cotangent, vjp);
  return torch::stable::contiguous(*cotangent);
}

std::tuple<Tensor, Tensor, Tensor> masked_statistics_backward(const Tensor& grad_moments,
                                                              std::optional<Tensor> grad_gram_vjp,
                                                              std::optional<Tensor> grad_gram_input, const Tensor& vjp,
                                                              const Tensor& input, const Tensor& mask, bool need_x,
                                                              bool need_mask) {
  check_all(vjp, input, mask);
  check_cotangent("grad_moments", grad_moments, vjp.size(0), kMoments, vjp);
  check_same_device("grad_moments", grad_moments, vjp);
  const Call call(vjp);
  const Tensor R = canonical(vjp), x = canonical(input), M = torch::stable::contiguous(mask);
  const Tensor moments = torch::stable::contiguous(grad_moments);
  const auto gram_a = dense("grad_gram_vjp", grad_gram_vjp, vjp), gram_b = dense("grad_gram_input", grad_gram_input, vjp);
  Tensor grad_R = empty_field(R), grad_x = need_x ? empty_field(x) : empty_dense(x, {0}, x.scalar_type());
  Tensor grad_M = need_mask ? empty_dense(M, {M.size(0), 1, M.size(2), M.size(3)}, M.scalar_type())
                            : empty_dense(M, {0}, M.scalar_type());
  dispatch_floating("vjp", R.scalar_type(), [&](auto scalar) {
    using S = typename OnDevice<decltype(scalar)>::Type;
    using T = Accumulate<S>;
    const StatisticsGradients<S> grad{data<T>(moments),
                                      gram_a ? data<T>(*gram_a) : nullptr,
                                      gram_b ? data<T>(*gram_b) : nullptr,
                                      mutable_data<S>(grad_R),
                                      need_x ? mutable_data<S>(grad_x) : nullptr,
                                      need_mask ? mutable_data<T>(grad_M) : nullptr};
    statistics_backward(fields_of<S>(R, x, M), grad, call.device());
  });
  return {grad_R, grad_x, grad_M};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_ext, CUDA, m) {
  m.impl("masked_statistics", TORCH_BOX(&masked_statistics));
  m.impl("masked_statistics_backward", TORCH_BOX(&masked_statistics_backward));
}

}  // namespace sib_ext::cuda
