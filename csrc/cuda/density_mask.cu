// The op density_mask on a GPU: checks, memory and types; the kernels are in density_mask_kernels.cuh.

#include "tensors.cuh"

#include <string>
#include <tuple>

#include "../density_mask.h"
#include "density_mask_kernels.cuh"

namespace sib_ext::cuda {
namespace {

MaskProblem problem_of(const Tensor& R, const Options& o) {
  check_plane_size(R);
  MaskProblem problem{R.size(0), static_cast<int>(o.C), static_cast<int>(o.H), static_cast<int>(o.W), layout_of(R),
                      o.radius,  o.count_padding,       o.slope,               o.eps,                 {}};
  for (int row = 0; row < 3; ++row)
    problem.quantiles[row] = soft_quantile(o.pixels(), o.quantile(row), o.temperature, o.support);
  return problem;
}

std::tuple<Tensor, Tensor> density_mask(const Tensor& vjp, int64_t window, double temperature, double slope, double eps,
                                        std::string padding, double area) {
  const Options o = options_of(vjp, window, temperature, slope, eps, padding, area);
  const Call call(vjp);
  const Tensor R = canonical(vjp);
  const MaskProblem problem = problem_of(R, o);
  Tensor mask = empty_dense(R, {R.size(0), 1, o.H, o.W}, accumulation_type(R.scalar_type()));
  Tensor support = empty_dense(R, {R.size(0), kRows, o.support}, ScalarType::Long);
  dispatch_floating("vjp", R.scalar_type(), [&](auto type) {
    using S = typename OnDevice<decltype(type)>::Type;
    mask_forward(data<S>(R), problem, call.device(), mutable_data<Accumulate<S>>(mask), mutable_data<int64_t>(support));
  });
  return {mask, support};
}

Tensor density_mask_backward(const Tensor& grad_mask, const Tensor& vjp, const Tensor& mask, const Tensor& support,
                             int64_t window, double temperature, double slope, double eps, std::string padding,
                             double area) {
  const Options o = options_of(vjp, window, temperature, slope, eps, padding, area);
  check_saved(grad_mask, vjp, mask, support, o);
  check_same_device("grad_mask", grad_mask, vjp);
  check_same_device("mask", mask, vjp);
  check_same_device("support", support, vjp);
  const Call call(vjp);
  const Tensor R = canonical(vjp), G = torch::stable::contiguous(grad_mask), M = torch::stable::contiguous(mask);
  const Tensor picks = torch::stable::contiguous(support);
  const MaskProblem problem = problem_of(R, o);
  Tensor grad = empty_dense(R, {R.size(0), 1, o.H, o.W}, R.scalar_type());
  dispatch_floating("vjp", R.scalar_type(), [&](auto type) {
    using S = typename OnDevice<decltype(type)>::Type;
    using T = Accumulate<S>;
    mask_backward(data<T>(G), data<S>(R), data<T>(M), data<int64_t>(picks), problem, call.device(), mutable_data<S>(grad));
  });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sib_ext, CUDA, m) {
  m.impl("density_mask", TORCH_BOX(&density_mask));
  m.impl("density_mask_backward", TORCH_BOX(&density_mask_backward));
}

}  // namespace sib_ext::cuda
