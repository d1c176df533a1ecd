// One binary for every x86: each hot function is compiled for AVX-512, AVX2 and the baseline, and picked at load time.
#pragma once

#include <cstdint>  // brings __GLIBC__: picking at load time needs its loader

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define SIB_HAS_CLONES 1
#define SIB_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SIB_HAS_CLONES 0
#define SIB_CLONES
#endif
