// What the CUDA kernels of all ops share: number types, loads, sums within a block, launches. It needs no torch:
// tests/cuda_emulation compiles the same kernels for the CPU.
//
// Rules that every kernel keeps: no float atomics, and sums run in an order that depends on the sizes and the kind of GPU
// alone, so results are the same bit for bit every time; nothing waits for the device, and memory comes from the caller's
// allocator, so that a CUDA graph can capture every launch; offsets into a batch are 64 bits wide.
#pragma once

#ifdef SIB_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "../field.h"
#include "../host_device.h"

namespace sib_ext::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---------------------------------------------------------------------------------------------- host side

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where and on what a call's kernels run; allocate gives device memory that lives until the call returns.
struct Device {
  cudaStream_t stream;
  int multiprocessors;
  int64_t shared_bytes;  // the most shared memory that a block may have
  bool tensor_cores;     // that multiply TF32
  std::function<void*(int64_t)> allocate;

  template <class T>
  T* array(int64_t count) const {
    return static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T))));
  }
};

#ifndef SIB_CUDA_EMULATION
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  const bool other_gpu = status == cudaErrorNoKernelImageForDevice;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) +
                           (other_gpu ? "; SIB_EXT_IMPL=triton or reference does without, TORCH_CUDA_ARCH_LIST builds for this GPU" : ""));
}

template <class... Parameters, class... Arguments>
void launch(const Device& device, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            Arguments... arguments) {
  if (blocks > INT32_MAX) throw std::runtime_error("sib_ext: a CUDA kernel would need more than 2^31 blocks");
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          "sib_ext: shared memory of a CUDA kernel");
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, device.stream>>>(static_cast<Parameters>(arguments)...);
  check(cudaGetLastError(), "sib_ext: launch of a CUDA kernel");
}

extern __shared__ __align__(16) unsigned char shared_memory[];
__device__ inline unsigned char* block_memory() { return shared_memory; }
#endif

// -------------------------------------------------------------------------------------------- device side

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class S>
__device__ S narrow(Accumulate<S> v) {
  return v;
}
template <>
__device__ inline __half narrow<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Four neighbours, loaded and stored at once.
constexpr int kVector = 4;
template <class T>
struct alignas(sizeof(T) * kVector <= 16 ? sizeof(T) * kVector : 16) Four {
  T v[kVector];
};

// Where the fields of a call allow four at a time: aligned, and rows of pixels that are multiples of four.
inline bool vectorisable(const void* pointer, int64_t row, size_t element) {
  const size_t alignment = element * kVector <= 16 ? element * kVector : 16;
  return row % kVector == 0 && reinterpret_cast<uintptr_t>(pointer) % alignment == 0;
}

__device__ inline float exponential(float v) { return expf(v); }
__device__ inline double exponential(double v) { return exp(v); }

template <class T>
__device__ T sigmoid(T v) {
  return T(1) / (T(1) + exponential(-v));
}

// v, which the compiler takes for a new number: what follows from it is computed again, not kept from before a loop in
// registers that the loop needs.
__device__ inline int anew(int v) {
#ifndef SIB_CUDA_EMULATION
  asm volatile("" : "+r"(v));
#endif
  return v;
}

// A sum over the warp, in a fixed order; lane 0 has it.
template <class T>
__device__ T warp_sum(T v) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_down_sync(kAllLanes, v, offset);
  return v;
}

// A sum over the block, in a fixed order; every thread has it. Scratch holds a value per warp.
template <class T>
__device__ T block_sum(T v, T* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  v = warp_sum(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  T total = 0;
  for (int i = 0; i < warps; ++i) total += scratch[i];
  __syncthreads();
  return total;
}

}  // namespace sib_ext::cuda
