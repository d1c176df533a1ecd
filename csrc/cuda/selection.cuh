// The order statistics of a soft quantile, by radix selection: exact, with ties going to the lower pixel.
//
// Non-negative floats sort like their bits, so (bits, pixel) is a key without ties. A quantile's support is what lies
// between two keys, its ends. Digit by digit from the top, a histogram of the keys that share an end's digits so far
// says what the next digit is. Six ends (three quantiles) are found in the same passes. As soon as few keys are left
// between the ends, they are listed and sorted, and the support is a stretch of that list; two digits are enough but
// for equal values, where the passes go on to the pixel's digits.
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
__device__ inline uint32_t bin_word(uint32_t bin) { return bin + bin / 32; }

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

// Digit i of a key, from the top.
template <class T>
SIB_HOST_DEVICE Digit key_digit(uint32_t pixels, int i) {
  return i < value_digits<T>() ? value_digit<T>(i) : pixel_digit(pixels, i - value_digits<T>());
}

// One end of a support: its key (digits not yet known are the lowest of a first end, the highest of a last one), its
// rank among the keys that share the known digits, and their count.
template <class T>
struct End {
  Word<T> value;
  uint32_t pixel, rank, count;
};

// Ends 2q and 2q + 1 are the first and the last of quantile q's support.
template <class T, int Q>
struct alignas(16) Selection {
  static constexpr int kEnds = 2 * Q;
  static constexpr int kWords = kEnds * kHistogram;  // of the histograms: ends with the same digits share one
  End<T> ends[kEnds];
  int histogram[kEnds];  // that each end reads
  int leader[kEnds];     // an end that reads each histogram
  int histograms;
  uint32_t filled[Q];  // of the lists
  uint32_t candidates;

  __device__ int words() const { return histograms * kHistogram; }
};

// ------------------------------------------------------------------------- pieces, called by whole blocks

// use(i, load(i)) for i = first, first + step, ...: several loads are under way before what they bring is first used and
// stored, which the compiler cannot arrange where it does not know that stores leave later loads alone.
template <int AtOnce, class Load, class Use>
__device__ void each_loaded(int first, int last, int step, Load load, Use use) {
  const auto batch = [&](int start, auto there) {
    decltype(load(first)) values[AtOnce];
#pragma unroll
    for (int i = 0; i < AtOnce; ++i)
      if (there(start + i * step)) values[i] = load(start + i * step);
#pragma unroll
    for (int i = 0; i < AtOnce; ++i)
      if (there(start + i * step)) use(start + i * step, values[i]);
  };
  int start = first;
  for (; start + (AtOnce - 1) * step < last; start += AtOnce * step) batch(start, [](int) { return true; });
  if (start < last) batch(start, [&](int i) { return i < last; });
}

template <class T, int Q>
__device__ void start_selection(Selection<T, Q>& s, const SoftQuantile* quantiles, uint32_t pixels) {
  const int i = threadIdx.x;
  if (i < 2 * Q) {
    const SoftQuantile& q = quantiles[i / 2];
    const bool last = i % 2;
    s.ends[i] = {last ? ~Word<T>(0) >> 1 : Word<T>(0), last ? (1u << pixel_bits(pixels)) - 1 : 0,
                 static_cast<uint32_t>(q.start + (last ? q.size - 1 : 0)), pixels};
    s.histogram[i] = 0;
  }
  if (i < Q) s.filled[i] = 0;
  if (i == 0) s.histograms = 2;  // the room of the first digit's only one
}

__device__ inline void clear(uint32_t* histograms, int words) {
  for (int word = threadIdx.x; word < words; word += blockDim.x) histograms[word] = 0;
}

// Keys between a support's ends, themselves included, as far as they are known.
template <class T, int Q>
__device__ uint32_t between(const Selection<T, Q>& s, int q, int64_t size) {
  const End<T>&first = s.ends[2 * q], &last = s.ends[2 * q + 1];
  return static_cast<uint32_t>(size) - 1 + first.rank + last.count - last.rank;
}

template <class T, int Q>
__device__ uint32_t most_between(const Selection<T, Q>& s, int64_t size) {
  uint32_t most = 0;
  for (int q = 0; q < Q; ++q) most = between(s, q, size) > most ? between(s, q, size) : most;
  return most;
}

// Which histogram each end reads: called before its digit is counted.
template <class T, int Q>
__device__ void share_histograms(Selection<T, Q>& s, Digit digit) {
  if (threadIdx.x >= kWarp) return;
  const int i = threadIdx.x;
  const bool is_end = i < 2 * Q;
  int leader = i;
  for (int j = i - 1; is_end && j >= 0; --j) {
    const End<T>&end = s.ends[i], &other = s.ends[j];
    const int known = digit.of_pixel ? 0 : digit.found;
    const bool same = end.value >> known == other.value >> known;
    const bool same_pixel = end.pixel >> digit.found % 32 == other.pixel >> digit.found % 32;
    if (same && (same_pixel || !digit.of_pixel)) leader = j;
  }
  const unsigned leaders = __ballot_sync(kAllLanes, is_end && leader == i);
  const int histogram = __popc(leaders & ((1u << leader) - 1));
  if (is_end) s.histogram[i] = histogram;
  if (is_end && leader == i) s.leader[histogram] = i;
  if (i == 0) s.histograms = __popc(leaders);
}

// Pixels whose loads are under way at once: three quantiles leave few registers.
template <int Q>
constexpr int kAtOnce = Q == 1 ? 8 : 2;

template <class T>
__device__ int first_bin(T v) {
  return static_cast<int>(ordered(v) >> value_digit<T>(0).shift);
}

// Counts the first digit of one thread's pixels at(0), ..., at(count - 1); those that follow each other into the same
// bin are added together.
template <class T, class At>
__device__ void count_first(const T* plane, uint32_t count, At at, uint32_t* histogram) {
  int bin = 0;
  uint32_t length = 0;
  each_loaded<8>(
      0, count, 1, [&](int k) { return first_bin(plane[at(k)]); },
      [&](int, int next) {
        if (next != bin) atomicAdd(&histogram[bin_word(bin)], length);
        length = next != bin ? 1 : length + 1;
        bin = next;
      });
  if (length) atomicAdd(&histogram[bin_word(bin)], length);
}

// Counts a later digit likewise, of the pixels that share what is known of an end.
template <class T, int Q, class At>
__device__ void count_next(const T* plane, uint32_t count, At at, const Selection<T, Q>& s, Digit digit,
                           uint32_t* histograms) {
  constexpr int kEnds = 2 * Q;
  Word<T> known[kEnds];
  uint32_t known_pixel[kEnds], bins[kEnds], lengths[kEnds];
  const int used = s.histograms;
  // All of the value is known before the pixel's digits, and nothing of the pixel before.
  const int known_from = digit.of_pixel ? 0 : digit.found, pixel_known_from = digit.of_pixel ? digit.found : 31;
#pragma unroll
  for (int i = 0; i < kEnds; ++i) {
    const End<T>& end = s.ends[i < used ? s.leader[i] : 0];
    known[i] = end.value >> known_from;
    known_pixel[i] = digit.of_pixel ? end.pixel >> pixel_known_from : 0;
    bins[i] = lengths[i] = 0;
  }
  const uint32_t mask = digit.bins() - 1;
  each_loaded<kAtOnce<Q>>(
      0, count, 1, [&](int k) { return ordered(plane[at(k)]); },
      [&](int k, Word<T> bits) {
        const uint32_t p = at(k);
        const uint32_t bin = (digit.of_pixel ? p >> digit.shift : static_cast<uint32_t>(bits >> digit.shift)) & mask;
#pragma unroll
        for (int i = 0; i < kEnds; ++i) {
          if (i >= used) break;
          const bool here = bits >> known_from == known[i] && p >> pixel_known_from == known_pixel[i];
          const bool moves = here && bin != bins[i];
          if (moves) atomicAdd(&histograms[i * kHistogram + bin_word(bins[i])], lengths[i]);
          bins[i] = moves ? bin : bins[i];
          lengths[i] = (moves ? 0 : lengths[i]) + here;
        }
      });
#pragma unroll
  for (int i = 0; i < kEnds; ++i)
    if (lengths[i]) atomicAdd(&histograms[i * kHistogram + bin_word(bins[i])], lengths[i]);
}

// The next digit of one end; called by one warp.
template <class T>
__device__ void descend(End<T>& end, const uint32_t* histogram, Digit digit) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t rank = end.rank;
  uint32_t below = 0, count = end.count;
  int first = 0;
  // The bin is one of so many from the first one on, with so many keys below them: a 32nd of them each time.
  for (int left = digit.bins(); left > 1;) {
    const int stretch = left > kWarp ? left / kWarp : 1;
    uint32_t mine = 0;
#pragma unroll 8
    for (int i = lane * stretch; i < (lane + 1) * stretch && i < left; ++i) mine += histogram[bin_word(first + i)];
    uint32_t up_to_here = mine;
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const uint32_t before = __shfl_up_sync(kAllLanes, up_to_here, offset);
      if (lane >= offset) up_to_here += before;
    }
    const int owner = __ffs(__ballot_sync(kAllLanes, below + up_to_here > rank)) - 1;
    below += __shfl_sync(kAllLanes, up_to_here - mine, owner);
    count = __shfl_sync(kAllLanes, mine, owner);
    first += owner * stretch;
    left = stretch;
  }
  __syncwarp();  // all lanes have read the end before one changes it
  if (lane != 0) return;
  end.rank = rank - below;
  end.count = count;
  const uint32_t mask = digit.bins() - 1;
  if (digit.of_pixel) {
    end.pixel = (end.pixel & ~(mask << digit.shift)) | static_cast<uint32_t>(first) << digit.shift;
  } else {
    end.value = (end.value & ~(Word<T>(mask) << digit.shift)) | Word<T>(first) << digit.shift;
  }
}

template <class T, int Q>
__device__ void descend_all(Selection<T, Q>& s, Digit digit, const uint32_t* histograms) {
  for (int i = threadIdx.x / kWarp; i < 2 * Q; i += blockDim.x / kWarp)
    descend(s.ends[i], histograms + s.histogram[i] * kHistogram, digit);
}

// Lists, downwards from top, the pixels of one thread's run that may lie in a support, in any order. Few do: bits say
// which, so that a warp comes to the list once in 32 pixels.
template <class T, int Q>
__device__ void gather_candidates(const T* plane, uint32_t first, uint32_t last, Selection<T, Q>& s, uint16_t* top) {
  Word<T> low[Q], span[Q];
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    low[q] = s.ends[2 * q].value;
    span[q] = s.ends[2 * q + 1].value - low[q];
  }
  for (uint32_t start = first; start < last; start += 32) {
    const uint32_t end = last - start < 32 ? last : start + 32;
    uint32_t found = 0;
#pragma unroll 4
    for (uint32_t p = start; p < end; ++p) {
      const Word<T> bits = ordered(plane[p]);
      bool inside = false;
#pragma unroll
      for (int q = 0; q < Q; ++q) inside |= bits - low[q] <= span[q];
      found = 2 * found + inside;
    }
    if (found == 0) continue;
    uint32_t place = atomicAdd(&s.candidates, static_cast<uint32_t>(__popc(found)));
    for (; found != 0; found &= found - 1)
      top[-1 - static_cast<int>(place++)] = static_cast<uint16_t>(end - __ffs(found));
  }
}

// Lists those of one thread's pixels that lie between the ends of a support, in any order.
template <class T, int Q, class At>
__device__ void collect(const T* plane, uint32_t count, At at, const Selection<T, Q>& s, uint32_t* filled,
                        uint32_t* lists, int64_t length) {
  Word<T> low[Q], high[Q];
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    low[q] = s.ends[2 * q].value;
    high[q] = s.ends[2 * q + 1].value;
  }
  each_loaded<kAtOnce<Q>>(
      0, count, 1, [&](int k) { return ordered(plane[at(k)]); },
      [&](int k, Word<T> bits) {
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          if (bits - low[q] > high[q] - low[q]) continue;
          const uint32_t p = at(k);
          if (bits == low[q] && p < s.ends[2 * q].pixel) continue;
          if (bits == high[q] && p > s.ends[2 * q + 1].pixel) continue;
          lists[q * length + atomicAdd(&filled[q], 1u)] = p;
        }
      });
}

// The smallest power of two that is not below size: the length of a list that can be sorted.
SIB_HOST_DEVICE inline int64_t list_length(int64_t size) {
  int64_t length = 1;
  while (length < size) length *= 2;
  return length;
}

constexpr int64_t kFewKeys = 128;  // so many are sorted at least, rather than told apart by another pass
constexpr uint32_t kNoPixel = UINT32_MAX;

// Fills what the lists hold beyond the keys between the ends.
template <class T, int Q>
__device__ void pad_lists(const Selection<T, Q>& s, uint32_t* lists, int64_t length, int64_t size) {
  for (int q = 0; q < Q; ++q)
    for (int64_t k = between(s, q, size) + threadIdx.x; k < length; k += blockDim.x) lists[q * length + k] = kNoPixel;
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
  __syncthreads();
  for (int64_t size = 2; size <= length; size *= 2) {
    for (int64_t step = size / 2; step > 0; step /= 2) {
      // A warp's steps of up to 32 stay within the same 64 pixels of a list.
      if (size > 2 * kWarp && step >= kWarp) {
        __syncthreads();
      } else {
        __syncwarp();
      }
      for (int64_t i = threadIdx.x; i < count * length / 2; i += blockDim.x) {
        const int64_t low = 2 * i - (i & (step - 1)), high = low + step;
        const bool upwards = (low & (length - 1) & size) == 0;  // the last round is upwards in every list
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
