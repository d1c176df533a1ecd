// SIB_HOST_DEVICE: a function that both the CPU's and nvcc's compiler take, for code that kernels of all devices share.
#pragma once

#ifdef __CUDACC__
#define SIB_HOST_DEVICE __host__ __device__
#else
#define SIB_HOST_DEVICE
#endif
