// What both CPU kernels need: vectorised conversions and exponentials.
#pragma once

#include <cmath>
#include <cstring>

#include "../tensors.h"
#include "clones.h"

// Inlined into the clones, and so compiled for their targets.
#define SIB_INLINE inline __attribute__((always_inline))
#define SIB_SIMD _Pragma("omp simd")

namespace sib_ext {

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
