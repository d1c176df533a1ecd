// Products of float32 tiles on tensor cores. A float is split into two TF32 numbers (high + low: 21 bits or more of
// its 24), and three products (all but low * low) give float32's accuracy. Tensor cores round sums towards zero, so only
// eight products are summed there; those sums are added in ordinary float32.
//
// Not as in plain float32: where an operand is infinite (or within half a TF32 ulp of it) or a product overflows, the sum
// may be NaN instead of an infinity.
#pragma once

#include "common.cuh"

namespace sib_ext::cuda {

#ifdef SIB_CUDA_EMULATION
using ::emulation::multiply_add_tf32;
#else
// sums [16,8] += a [16,8] @ b [8,8], by a warp (PTX: mma.m16n8k8, which says who holds what).
__device__ inline void multiply_add_tf32(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
#endif

constexpr uint32_t kHeld = 0xffffe000u;  // the bits of a float that TF32 holds

__device__ inline float as_float(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

// high is v rounded to TF32. (cvt.rna.tf32 does the same, and minds infinities, in twice the instructions.) low goes in
// as it is: the tensor core cuts off what TF32 does not hold.
__device__ inline void split(float v, uint32_t& high, uint32_t& low) {
  memcpy(&high, &v, sizeof v);
  high = (high + 0x1000u) & kHeld;
  const float rest = v - as_float(high);
  memcpy(&low, &rest, sizeof rest);
}

constexpr int kTensorStride = 64 + 8;  // of a row in shared memory: a warp's reads meet all banks
constexpr int kTensorRows = 8;         // that are taken at a time

// A tile of 64 x 64, formed by eight warps of 32 x 16: sums = left^T right, where rows of both are 64 values long. Value c
// of row k lies at [k][c ^ Swizzle * (k / 4 % 4)].
template <int Swizzle>
class TensorProduct {
 public:
  __device__ TensorProduct()
      : row_(threadIdx.x / kWarp / 4 * 32 + threadIdx.x % kWarp / 4),
        column_(threadIdx.x / kWarp % 4 * 16),
        lane_row_(threadIdx.x % kWarp / 4),
        lane_column_(threadIdx.x % kWarp % 4) {}

  // The rows [k, k + kTensorRows) of both.
  __device__ void add(const float* left, const float* right, int k) {
    __syncwarp();  // lanes may have parted where they loaded
    uint32_t high_a[2][4], low_a[2][4], high_b[2][2], low_b[2][2];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        split(left[line(k + i / 2 * 4) + row_ + (m * 16 + i % 2 * 8 ^ swizzle(k + i / 2 * 4))], high_a[m][i], low_a[m][i]);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        split(right[line(k + i * 4) + (column_ ^ swizzle(k + i * 4) & 16) + lane_row_ + (n * 8 ^ swizzle(k + i * 4) & 8)],
              high_b[n][i], low_b[n][i]);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float eight[4] = {};
        multiply_add_tf32(eight, low_a[m], high_b[n]);
        multiply_add_tf32(eight, high_a[m], low_b[n]);
        multiply_add_tf32(eight, high_a[m], high_b[n]);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[m][n][i] += eight[i];
      }
    }
  }

  __device__ void store(float* out, int stride) const {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          out[(row_ + m * 16 + i / 2 * 8) * stride + column_ + n * 8 + lane_column_ * 2 + i % 2] = sums_[m][n][i];
  }

 private:
  // Of this lane's row among the four from k on, a multiple of four: where it begins, and what is turned around in it:
  // 8 and 16, so that, parted by those bits, most of a place is known when this is compiled.
  static_assert(Swizzle == 0 || Swizzle == 8);
  __device__ int line(int k) const { return (k + lane_column_) * kTensorStride; }
  __device__ static constexpr int swizzle(int k) { return Swizzle * (k / 4 % 4); }

  float sums_[2][2][4] = {};
  int row_, column_, lane_row_, lane_column_;
};

}  // namespace sib_ext::cuda
