// How a field [B,C,H,W] lies in memory and in which type it is summed, shared by the kernels of every device.
#pragma once

#include <cstdint>
#include <type_traits>

namespace sib_ext {

// A [B,C,H,W] seen as [B,C,P]: contiguous (pixel stride 1) or channels_last (channel stride 1).
struct Layout {
  int64_t batch, channel, pixel;
};

template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace sib_ext
