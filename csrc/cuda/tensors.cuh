// Between torch's tensors and the CUDA kernels: the device and stream of a call, its temporary memory, its types.
#pragma once

#include "../tensors.h"
#include "common.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace sib_ext::cuda {

// The kernels' type for a tensor's element type.
template <class S>
struct OnDevice {
  using Type = S;
};
template <>
struct OnDevice<BFloat16> {
  using Type = __nv_bfloat16;
};
template <>
struct OnDevice<Half> {
  using Type = __half;
};

// SIB_EXT_TENSOR_CORES=0 keeps products in plain float32, to measure or to rule out what tensor cores do.
inline bool tensor_cores_wanted() {
  static const char* const value = std::getenv("SIB_EXT_TENSOR_CORES");
  return !value || std::string(value) != "0";
}

// Makes a tensor's device the current one for the length of a call, and holds the memory of the call's temporaries:
// tensors of the caching allocator, given back to it (in the order of the stream) when the call returns.
class Call {
 public:
  explicit Call(const Tensor& on) : guard_(on.get_device_index()), on_(on) {
    const int index = static_cast<int>(on.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    const auto ask = [&](cudaDeviceAttr attribute) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, attribute, index), "sib_ext: asking the device");
      return value;
    };
    const bool tensor_cores = ask(cudaDevAttrComputeCapabilityMajor) >= 8 && tensor_cores_wanted();
    device_ = {static_cast<cudaStream_t>(stream), ask(cudaDevAttrMultiProcessorCount),
               ask(cudaDevAttrMaxSharedMemoryPerBlockOptin), tensor_cores, [this](int64_t bytes) {
                 temporaries_.push_back(empty_dense(on_, {bytes}, ScalarType::Byte));
                 return temporaries_.back().data_ptr();
               }};
  }
  Call(const Call&) = delete;

  const Device& device() const { return device_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  const Tensor& on_;
  std::vector<Tensor> temporaries_;
  Device device_;
};

inline void check_same_device(const char* name, const Tensor& t, const Tensor& field) {
  STD_TORCH_CHECK(t.get_device_index() == field.get_device_index(), name, " must be on the device of vjp, cuda:",
                  field.get_device_index(), ", got cuda:", t.get_device_index());
}

// Pixels of one image are counted in 32 bits.
inline void check_plane_size(const Tensor& field) {
  STD_TORCH_CHECK(field.size(2) <= INT32_MAX / field.size(3), "an image of ", field.size(2), " x ", field.size(3),
                  " is more than the CUDA kernels take (2^31 pixels); impl='reference' takes it");
  STD_TORCH_CHECK(field.size(1) <= INT32_MAX, "more than 2^31 channels");
}

}  // namespace sib_ext::cuda
