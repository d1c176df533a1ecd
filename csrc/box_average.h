// The divisor of the box average, shared by every kernel.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace sib_ext {

// How many positions of one axis the average at a position counts.
SIB_HOST_DEVICE inline int64_t box_span(int64_t position, int64_t size, int64_t radius, bool count_padding) {
  if (count_padding) return 2 * radius + 1;
  const int64_t last = position + radius < size ? position + radius : size - 1;
  return last - (position > radius ? position - radius : 0) + 1;
}

}  // namespace sib_ext
