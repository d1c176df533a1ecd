// What the native kernels of every device need of tensors: the stable ABI, types, fields with strides, checks.
#pragma once

// The oldest torch whose stable ABI has what is used here (parallel_for, memory formats).
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>
#include <vector>

#include "field.h"

namespace sib_ext {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f(T{}) with the C++ type of a floating-point tensor.
template <class F>
void dispatch_floating(const char* name, ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double: return f(double{});
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
  }
}

// ------------------------------------------------------------------------------------------------ fields

inline bool is_channels_last(const Tensor& t) {
  const int64_t C = t.size(1), H = t.size(2), W = t.size(3);
  const auto fits = [&](int64_t dim, int64_t stride) { return t.size(dim) == 1 || t.stride(dim) == stride; };
  return !t.is_contiguous() && fits(1, 1) && fits(3, C) && fits(2, W * C) && fits(0, H * W * C);
}

inline Tensor canonical(const Tensor& t) { return is_channels_last(t) ? t : torch::stable::contiguous(t); }

inline Layout layout_of(const Tensor& t) {
  const int64_t C = t.size(1), P = t.size(2) * t.size(3);
  return is_channels_last(t) ? Layout{C * P, 1, C} : Layout{C * P, P, 1};
}

// Uninitialised, with the size, type and memory format of a canonical tensor.
inline Tensor empty_field(const Tensor& t) {
  using torch::headeronly::MemoryFormat;
  const auto format = is_channels_last(t) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return torch::stable::empty(t.sizes(), t.scalar_type(), std::nullopt, t.device(), std::nullopt, format);
}

inline Tensor empty_dense(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::empty(shape, type, std::nullopt, like.device());
}

inline void check_field(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must have the four dimensions [B,C,H,W], got ", t.dim());
  STD_TORCH_CHECK(t.size(1) > 0 && t.size(2) > 0 && t.size(3) > 0, name, " must have at least one channel and one pixel");
}

// M or its cotangent: [B,1,H,W] in the accumulation type of the field.
inline void check_plane(const char* name, const Tensor& t, const Tensor& field) {
  STD_TORCH_CHECK(
      t.dim() == 4 && t.size(0) == field.size(0) && t.size(1) == 1 && t.size(2) == field.size(2) && t.size(3) == field.size(3),
      name, " must be [B,1,H,W] with the sizes of the field");
  STD_TORCH_CHECK(t.scalar_type() == accumulation_type(field.scalar_type()), name,
                  " must be float32 (float64 for a float64 field), got ", torch::headeronly::toString(t.scalar_type()));
}

template <class T>
const T* data(const Tensor& t) { return static_cast<const T*>(t.data_ptr()); }

template <class T>
T* mutable_data(Tensor& t) { return static_cast<T*>(t.data_ptr()); }

}  // namespace sib_ext
