// What both CPU kernels need: the stable ABI, fields with strides, vectorised conversions and exponentials.
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
#include <cstring>
#include <type_traits>

#include "clones.h"

// Inlined into the clones, and so compiled for their targets.
#define SIB_INLINE inline __attribute__((always_inline))
#define SIB_SIMD _Pragma("omp simd")

namespace sib_ext {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

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

// ------------------------------------------------------------------------------------------- conversions

SIB_INLINE double widen(double v) { return v; }
SIB_INLINE float widen(float v) { return v; }

SIB_INLINE float from_bits(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

SIB_INLINE uint32_t to_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

SIB_INLINE float widen(BFloat16 v) { return from_bits(static_cast<uint32_t>(v.x) << 16); }

// Branch-free, so that loops over halves vectorise: rescale the exponent by 2^112, keep Inf and NaN.
SIB_INLINE float widen(Half v) {
  const uint32_t magnitude = static_cast<uint32_t>(v.x & 0x7fff) << 13;
  const uint32_t scaled = to_bits(from_bits(magnitude) * from_bits(0x77800000u));
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return from_bits(scaled | special | (static_cast<uint32_t>(v.x & 0x8000) << 16));
}

// ------------------------------------------------------------------------------------------------ fields

// A [B,C,H,W] seen as [B,C,P]: contiguous (pixel stride 1) or channels_last (channel stride 1).
struct Layout {
  int64_t batch, channel, pixel;
};

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

// -------------------------------------------------------------------------------------------- arithmetic

// exp for |v| <= 87, about 1 ulp; written without branches or library calls so that loops vectorise.
SIB_INLINE float exponential(float v) {
  v = v < -87.0f ? -87.0f : v;
  v = v > 87.0f ? 87.0f : v;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float rounded = v * 1.44269504f + shift;
  const float n = rounded - shift;
  const float r = (v - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * from_bits((to_bits(rounded) + 127u) << 23);
}

SIB_INLINE double exponential(double v) { return std::exp(v); }

template <class T>
SIB_INLINE T sigmoid(T v) { return T(1) / (T(1) + exponential(-v)); }

}  // namespace sib_ext
