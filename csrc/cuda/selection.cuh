// The order statistics of a soft quantile, by radix selection: exact, with ties going to the lower pixel.
//
// Non-negative floats sort like their bits, so (bits, pixel) is a key without ties. A quantile's support is what lies
// between two keys, its ends. Digit by digit from the top, a histogram of the keys that share an end's digits so far
// says what the next digit is; the pixel's digits are needed only where the support cuts through equal values. Six ends
// (three quantiles) are found in the same passes. Then one pass lists the support's pixels, and the list is sorted.
//
// The pieces work on a plane in shared memory (one block a sample) and on one in global memory (many blocks a sample).
#pragma once

#include <cstring>

#include "../order_statistics.h"
#include "common.cuh"

namespace sib_ext::cuda {

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using Word = uint32_t;
  static constexpr int kCount = 31;
  static constexpr Word kInfinity = 0x7f800000u;
};
template <>
struct Bits<double> {
  using Word = uint64_t;
  static constexpr int kCount = 63;
  static constexpr Word kInfinity = 0x7ff0000000000000ull;
};
template <class T>
using Word = typename Bits<T>::Word;

// The bits without the sign: -0 is 0, NaN lies above infinity.
template <class T>
__device__ Word<T> ordered(T v) {
  Word<T> bits;
  memcpy(&bits, &v, sizeof bits);
  return bits & ~(Word<T>(1) << Bits<T>::kCount);
}

// The first digit is wider than the others: the exponent and a little more spread values over more bins.
constexpr int kFirstDigit = 11, kDigit = 10;
// A word of padding every 32 lets a warp read 32 stretches of a histogram without conflicts of banks.
constexpr int kHistogram = (1 << kDigit) + (1 << kDigit) / 32;  // the first digit takes two of these
__device__ inline int bin_word(int bin) { return bin + bin / 32; }

struct Digit {
  bool of_pixel;
  int shift, found;  // the digit's bits are [shift, found); those from found on are known

  SIB_HOST_DEVICE int bins() const { return 1 << (found - shift); }
};

template <class T>
SIB_HOST_DEVICE constexpr int value_digits() {
  return 1 + (Bits<T>::kCount - kFirstDigit + kDigit - 1) / kDigit;
}

template <class T>
SIB_HOST_DEVICE Digit value_digit(int i) {
  const int found = i == 0 ? Bits<T>::kCount : Bits<T>::kCount - kFirstDigit - (i - 1) * kDigit;
  const int width = i == 0 ? kFirstDigit : kDigit;
  return {false, found > width ? found - width : 0, found};
}

SIB_HOST_DEVICE inline int pixel_bits(uint32_t pixels) {
  int bits = 0;
  while (bits < 32 && (pixels - 1) >> bits != 0) ++bits;
  return bits;
}

SIB_HOST_DEVICE inline int pixel_digits(uint32_t pixels) { return (pixel_bits(pixels) + kDigit - 1) / kDigit; }

SIB_HOST_DEVICE inline Digit pixel_digit(uint32_t pixels, int i) {
  const int found = pixel_bits(pixels) - i * kDigit;
  return {true, found > kDigit ? found - kDigit : 0, found};
}

// One end of a support: the digits of its key that are known, and its rank among the keys that share them.
template <class T>
struct End {
  Word<T> value;
  uint32_t pixel, rank, count;
  bool open;  // false once the end is settled
};

// Ends 2q and 2q + 1 are the first and the last of quantile q's support.
template <class T, int Q>
struct alignas(16) Selection {
  static constexpr int kEnds = 2 * Q;
  static constexpr int kWords = kEnds * kHistogram;
  uint32_t histograms[kWords];
  End<T> ends[kEnds];
  int leader[kEnds];  // the first end with the same digits, whose histogram serves both; -1 where settled
  uint32_t filled[Q];
};

// ------------------------------------------------------------------------- pieces, called by whole blocks

template <class T, int Q>
__device__ void start_selection(Selection<T, Q>& s, const SoftQuantile* quantiles, uint32_t pixels) {
  const int i = threadIdx.x;
  if (i < 2 * Q) {
    const SoftQuantile& q = quantiles[i / 2];
    s.ends[i] = {0, 0, static_cast<uint32_t>(q.start + (i % 2 ? q.size - 1 : 0)), pixels, true};
  }
  if (i < Q) s.filled[i] = 0;
}

// Which histogram each end reads; all histograms empty.
template <class T, int Q>
__device__ void prepare_count(Selection<T, Q>& s) {
  const int i = threadIdx.x;
  if (i < 2 * Q) {
    int leader = i;
    for (int j = i - 1; j >= 0; --j) {
      if (s.ends[j].open && s.ends[j].value == s.ends[i].value && s.ends[j].pixel == s.ends[i].pixel) leader = j;
    }
    s.leader[i] = s.ends[i].open ? leader : -1;
  }
  for (int word = threadIdx.x; word < s.kWords; word += blockDim.x) s.histograms[word] = 0;
}

template <class T, int Q>
__device__ bool any_open(const Selection<T, Q>& s) {
  bool open = false;
  for (int i = 0; i < 2 * Q; ++i) open |= s.ends[i].open;
  return open;
}

// Counts one thread's run of pixels; neighbours that fall into the same bin are added together.
template <class T, int Q>
__device__ void count_run(const T* plane, uint32_t first, uint32_t last, const Selection<T, Q>& s, Digit digit,
                          uint32_t* histograms) {
  constexpr int kEnds = 2 * Q;
  Word<T> known[kEnds];
  uint32_t known_pixel[kEnds], bins[kEnds], lengths[kEnds];
  bool leads[kEnds];
#pragma unroll
  for (int i = 0; i < kEnds; ++i) {
    leads[i] = s.leader[i] == i;
    known[i] = digit.of_pixel ? s.ends[i].value : s.ends[i].value >> digit.found;
    known_pixel[i] = s.ends[i].pixel >> digit.found % 32;
    bins[i] = lengths[i] = 0;
  }
  const uint32_t mask = digit.bins() - 1;
  for (uint32_t p = first; p < last; ++p) {
    const Word<T> bits = ordered(plane[p]);
    const Word<T> prefix = digit.of_pixel ? bits : bits >> digit.found;
    const uint32_t bin = (digit.of_pixel ? p >> digit.shift : static_cast<uint32_t>(bits >> digit.shift)) & mask;
#pragma unroll
    for (int i = 0; i < kEnds; ++i) {
      if (!leads[i] || prefix != known[i]) continue;
      if (digit.of_pixel && p >> digit.found % 32 != known_pixel[i]) continue;
      if (bin != bins[i]) {
        if (lengths[i]) atomicAdd(&histograms[i * kHistogram + bin_word(bins[i])], lengths[i]);
        bins[i] = bin;
        lengths[i] = 0;
      }
      ++lengths[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kEnds; ++i)
    if (lengths[i]) atomicAdd(&histograms[i * kHistogram + bin_word(bins[i])], lengths[i]);
}

// The next digit of one end; called by one warp.
template <class T>
__device__ void descend(End<T>& end, const uint32_t* histogram, Digit digit) {
  const int lane = threadIdx.x % kWarp, bins = digit.bins(), stretch = bins > kWarp ? bins / kWarp : 1;
  const uint32_t rank = end.rank;
  __syncwarp();  // all lanes have the rank before one changes it
  uint32_t mine = 0;
  for (int bin = lane * stretch; bin < (lane + 1) * stretch && bin < bins; ++bin) mine += histogram[bin_word(bin)];
  uint32_t up_to_here = mine;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const uint32_t before = __shfl_up_sync(kAllLanes, up_to_here, offset);
    if (lane >= offset) up_to_here += before;
  }
  uint32_t below = up_to_here - mine;
  if (below <= rank && rank < up_to_here) {
    int bin = lane * stretch;
    for (uint32_t count; below + (count = histogram[bin_word(bin)]) <= rank; ++bin) below += count;
    end.rank = rank - below;
    end.count = histogram[bin_word(bin)];
    if (digit.of_pixel) {
      end.pixel |= static_cast<uint32_t>(bin) << digit.shift;
    } else {
      end.value |= static_cast<Word<T>>(bin) << digit.shift;
    }
  }
}

template <class T, int Q>
__device__ void descend_all(Selection<T, Q>& s, Digit digit) {
  for (int i = threadIdx.x / kWarp; i < 2 * Q; i += blockDim.x / kWarp)
    if (s.ends[i].open) descend(s.ends[i], s.histograms + s.leader[i] * kHistogram, digit);
}

// Once all values are known: an end stays open only where it cuts through equal values.
template <class T, int Q>
__device__ void settle_values(Selection<T, Q>& s) {
  const int i = threadIdx.x;
  if (i < 2 * Q) {
    End<T>& end = s.ends[i];
    end.open = i % 2 ? end.rank + 1 != end.count : end.rank != 0;
    end.pixel = end.open || i % 2 == 0 ? 0 : UINT32_MAX;
  }
}

// Lists one thread's pixels that lie in a support, in any order.
template <class T, int Q>
__device__ void collect_run(const T* plane, uint32_t first, uint32_t last, const Selection<T, Q>& s, uint32_t* filled,
                            uint32_t* lists, int64_t length) {
  Word<T> low[Q], high[Q];
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    low[q] = s.ends[2 * q].value;
    high[q] = s.ends[2 * q + 1].value;
  }
  for (uint32_t p = first; p < last; ++p) {
    const Word<T> bits = ordered(plane[p]);
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      if (bits < low[q] || bits > high[q]) continue;
      if (bits == low[q] && p < s.ends[2 * q].pixel) continue;
      if (bits == high[q] && p > s.ends[2 * q + 1].pixel) continue;
      lists[q * length + atomicAdd(&filled[q], 1u)] = p;
    }
  }
}

// The smallest power of two that holds a support: the length of its list.
SIB_HOST_DEVICE inline int64_t list_length(int64_t size) {
  int64_t length = 1;
  while (length < size) length *= 2;
  return length;
}

constexpr uint32_t kNoPixel = UINT32_MAX;

// Fills what the lists hold beyond the support.
__device__ inline void pad_lists(uint32_t* lists, int count, int64_t length, int64_t size) {
  for (int q = 0; q < count; ++q)
    for (int64_t k = size + threadIdx.x; k < length; k += blockDim.x) lists[q * length + k] = kNoPixel;
}

template <class T>
__device__ bool comes_before(const T* plane, uint32_t p, uint32_t other) {
  if (p == kNoPixel || other == kNoPixel) return p < other;
  const Word<T> bits = ordered(plane[p]), other_bits = ordered(plane[other]);
  return bits < other_bits || (bits == other_bits && p < other);
}

// Sorts lists of pixels by (value, pixel): a bitonic network, whose length is a power of two.
template <class T>
__device__ void sort_lists(const T* plane, uint32_t* lists, int count, int64_t length) {
  for (int64_t size = 2; size <= length; size *= 2) {
    for (int64_t step = size / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int64_t i = threadIdx.x; i < count * length / 2; i += blockDim.x) {
        const int64_t low = i / step * 2 * step + i % step, high = low + step;
        const bool upwards = (low % length & size) == 0;  // the last round is upwards in every list
        const uint32_t a = lists[low], b = lists[high];
        if (comes_before(plane, b, a) == upwards) {
          lists[low] = b;
          lists[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

// A soft quantile of the sorted values value(0..size), called by one warp; lane 0 has it. Relative to the lowest
// value: exact where all are equal.
template <class T, class Value>
__device__ T take_quantile(const SoftQuantile& q, Value value) {
  const T low = value(0);
  double rise = 0;
  for (int64_t k = threadIdx.x % kWarp; k < q.size; k += kWarp) rise += q.weight(k) * (value(k) - low);
  return low + static_cast<T>(warp_sum(rise));
}

}  // namespace sib_ext::cuda
