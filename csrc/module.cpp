// The pybind11 module around the kernels, the only file that sees Python: importing it registers them.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/clones.h"

#ifndef SIB_EXT_DEVICE
#error "setup.py defines SIB_EXT_DEVICE: the device whose kernels are in this module"
#endif

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::string vector_instructions() {
#if SIB_HAS_CLONES
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return "AVX-512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "AVX2";
#endif
  return "baseline";
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["device"] = SIB_EXT_DEVICE;
        info["compiler"] = compiler();
        info["cxx_standard"] = static_cast<long>(__cplusplus);
        if (info["device"].cast<std::string>() == "cpu") info["vector_instructions"] = vector_instructions();
        return info;
      },
      "What this module was built with, and the vector instructions that CPU kernels use on this machine.");
}
