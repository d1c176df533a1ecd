// CUDA on the CPU, for tests: enough of it to compile the kernels with g++ and run them on small inputs.
//
// Every thread of a block is a fiber (ucontext). A fiber runs until it meets a barrier or a warp's exchange and goes on
// once all that must be there are there. Blocks run one after another. What the hardware leaves open is varied: fibers
// and blocks run in rising, falling or scattered order, and a block's shared memory starts as garbage, so that a missing
// barrier, a dependency between blocks or a read of nothing changes a result. Barriers that not all threads reach, and
// warps whose lanes meet in different places, stop the program with a message.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

// --------------------------------------------------------------------------------------------- value types

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half v) {
  _Float16 value;
  std::memcpy(&value, &v, sizeof value);
  return static_cast<float>(value);
}

inline __half __float2half_rn(float v) {
  const _Float16 value = static_cast<_Float16>(v);
  __half half;
  std::memcpy(&half, &value, sizeof half);
  return half;
}

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  if (std::isnan(v)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// ---------------------------------------------------------------------------------------------- the machine

namespace emulation {

struct Index {
  unsigned x = 0;
};

enum class Order { kRising, kFalling, kScattered };
inline Order order = Order::kRising;

// What a fiber waits for; fibers of one warp (group, block) must wait for the same thing.
enum class Wait { kNothing, kBlock, kGroup, kWarp };

[[noreturn]] inline void stop(const char* reason) {
  std::fprintf(stderr, "CUDA emulation: %s\n", reason);
  std::abort();
}

constexpr size_t kStack = 64 << 10;
constexpr int kWarpSize = 32;

struct Words {
  unsigned char bytes[24];
};

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  unsigned thread = 0;
  bool done = false;
  Wait wait = Wait::kNothing;
  int place = 0;         // which kind of exchange a warp's lane waits in; how large the group is
  Words value;           // what it brings
  Words results[kWarpSize];  // what all lanes brought
};

struct Block {
  std::vector<Fiber> fibers;
  std::unique_ptr<unsigned char[]> memory;
  std::function<void()> kernel;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  int any = 0;
  int result_of_any = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
#endif
};

inline Block* block = nullptr;
inline Index thread_index() { return {block->running->thread}; }
inline Index block_index, block_size, grid_size;

// From the running fiber back to the scheduler.
inline void yield(Wait wait) {
  Fiber* self = block->running;
  self->wait = wait;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, block->scheduler_stack, block->scheduler_size);
#endif
  swapcontext(&self->context, &block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &block->scheduler_stack, &block->scheduler_size);
#endif
}

inline void start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_size);
#endif
  block->kernel();
  block->running->done = true;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, block->scheduler_stack, block->scheduler_size);
#endif
  swapcontext(&block->running->context, &block->scheduler);
}

inline void resume(Fiber& fiber) {
  block->running = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block->fake_stack, fiber.stack, kStack);
#endif
  swapcontext(&block->scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block->fake_stack, nullptr, nullptr);
#endif
}

// Lanes that all wait in the same exchange go on; false where some are elsewhere.
inline bool release_warp(size_t first) {
  auto* lanes = &block->fibers[first];
  for (int i = 0; i < kWarpSize; ++i) {
    if (lanes[i].done) stop("a lane has left the kernel while its warp exchanges values");
    if (lanes[i].wait != Wait::kWarp) return false;
    if (lanes[i].place != lanes[0].place) stop("lanes of one warp wait in different exchanges");
  }
  for (int i = 0; i < kWarpSize; ++i)
    for (int j = 0; j < kWarpSize; ++j) lanes[i].results[j] = lanes[j].value;
  for (int i = 0; i < kWarpSize; ++i) lanes[i].wait = Wait::kNothing;
  return true;
}

inline bool release_block() {
  size_t waiting = 0, done = 0;
  for (const Fiber& fiber : block->fibers) {
    waiting += fiber.wait == Wait::kBlock;
    done += fiber.done;
  }
  if (waiting && done) stop("a thread has left the kernel while others wait at a barrier");
  if (waiting != block->fibers.size()) return false;
  for (Fiber& fiber : block->fibers) fiber.wait = Wait::kNothing;
  block->result_of_any = block->any;
  block->any = 0;
  return true;
}

// The threads of one group go on together; others do not wait for them.
inline void group_sync(int group, int threads) {
  Fiber* self = block->running;
  if (static_cast<int>(self->thread) / threads != group) stop("a thread waits for another group");
  self->place = threads;
  yield(Wait::kGroup);
}

inline bool release_group(size_t first) {
  const size_t end = first + block->fibers[first].place;
  for (size_t i = first; i < end; ++i)
    if (block->fibers[i].wait != Wait::kGroup) return false;
  for (size_t i = first; i < end; ++i) block->fibers[i].wait = Wait::kNothing;
  return true;
}

inline std::vector<size_t> sequence(size_t count) {
  std::vector<size_t> order_of(count);
  for (size_t i = 0; i < count; ++i) order_of[i] = order == Order::kFalling ? count - 1 - i : i;
  if (order == Order::kScattered) {
    static uint64_t state = 1;
    for (size_t i = count; i > 1; --i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      std::swap(order_of[i - 1], order_of[(state >> 33) % i]);
    }
  }
  return order_of;
}

// Stacks outlive the launch: fresh pages would cost more than the kernels.
inline char* stack_of(size_t thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new char[kStack]);
  return stacks[thread].get();
}

inline void run_block(Block& b) {
  block = &b;
  for (size_t i = 0; i < b.fibers.size(); ++i) {
    Fiber& fiber = b.fibers[i];
    fiber.stack = stack_of(i);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.thread = static_cast<unsigned>(i);
    fiber.done = false;
    fiber.wait = Wait::kNothing;
    makecontext(&fiber.context, start, 0);
  }
  const std::vector<size_t> order_of = sequence(b.fibers.size());
  for (;;) {
    bool moved = false, unfinished = false;
    for (size_t i : order_of) {
      Fiber& fiber = b.fibers[i];
      if (!fiber.done && fiber.wait == Wait::kNothing) {
        resume(fiber);
        moved = true;
      }
      unfinished |= !fiber.done;
    }
    if (!unfinished) return;
    bool released = release_block();
    for (size_t first = 0; first < b.fibers.size(); first += kWarpSize) {
      const Fiber& fiber = b.fibers[first];
      if (fiber.wait == Wait::kWarp) released |= release_warp(first);
      else if (fiber.wait == Wait::kGroup && first % fiber.place == 0) released |= release_group(first);
    }
    if (!moved && !released) stop("threads wait for each other in different places");
  }
}

// A warp's lanes bring a value each; every lane sees all of them.
template <class T>
const Words* exchange(T value, int place) {
  static_assert(sizeof value <= sizeof(Words), "an exchange carries so much");
  Fiber* self = block->running;
  std::memcpy(&self->value, &value, sizeof value);
  self->place = place;
  yield(Wait::kWarp);
  return self->results;
}

template <class T>
T from_words(const Words& words) {
  T value;
  std::memcpy(&value, &words, sizeof value);
  return value;
}

inline int lane() { return block->running->thread % kWarpSize; }

// Rounds to TF32: 10 bits after the leading one, nearest, ties away from zero.
// mma.sync.m16n8k8 with TF32 operands. Lane l holds, with g = l/4 and t = l%4: of a [16,8] the elements (g,t), (g+8,t),
// (g,t+4), (g+8,t+4); of b [8,8] (t,g), (t+4,g); of the sums [16,8] (g,2t), (g,2t+1), (g+8,2t), (g+8,2t+1).
inline void multiply_add_tf32(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    float a[4], b[2];
  } mine;
  const auto held = [](uint32_t bits) {  // TF32 has ten bits of mantissa; what is below is cut off
    bits &= 0xffffe000u;
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  };
  for (int i = 0; i < 4; ++i) mine.a[i] = held(a[i]);
  for (int i = 0; i < 2; ++i) mine.b[i] = held(b[i]);
  const Words* all = exchange(mine, 5);
  Operands of[kWarpSize];
  for (int i = 0; i < kWarpSize; ++i) of[i] = from_words<Operands>(all[i]);
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 8; ++k)
      sums[i] += of[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2] * of[column * 4 + k % 4].b[k / 4];
  }
}

}  // namespace emulation

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index)
#define blockDim (::emulation::block_size)
#define gridDim (::emulation::grid_size)

// ------------------------------------------------------------------------------------- device functions

inline void __syncthreads() { emulation::yield(emulation::Wait::kBlock); }

inline int __syncthreads_or(int predicate) {
  emulation::block->any |= predicate != 0;
  emulation::yield(emulation::Wait::kBlock);
  return emulation::block->result_of_any;
}

inline void __syncwarp() { emulation::exchange(0, 1); }

template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  const int source = emulation::lane() + offset;
  const emulation::Words* all = emulation::exchange(value, 2);
  return source < emulation::kWarpSize ? emulation::from_words<T>(all[source]) : value;
}

template <class T>
T __shfl_up_sync(unsigned, T value, int offset) {
  const int source = emulation::lane() - offset;
  const emulation::Words* all = emulation::exchange(value, 3);
  return source >= 0 ? emulation::from_words<T>(all[source]) : value;
}

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return emulation::from_words<T>(emulation::exchange(value, 4)[source % emulation::kWarpSize]);
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  const emulation::Words* all = emulation::exchange(predicate, 6);
  unsigned lanes = 0;
  for (int i = 0; i < emulation::kWarpSize; ++i) lanes |= (emulation::from_words<int>(all[i]) != 0 ? 1u : 0u) << i;
  return lanes;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }

template <class T>
T __ldg(const T* at) {
  return *at;
}

template <class T>
void __stcg(T* at, T value) {
  if (reinterpret_cast<uintptr_t>(at) % alignof(T) != 0) emulation::stop("a store that is not aligned");
  *at = value;
}

inline uint32_t atomicAdd(uint32_t* at, uint32_t value) {
  const uint32_t before = *at;
  *at += value;
  return before;
}

inline int atomicOr(int* at, int value) {
  const int before = *at;
  *at |= value;
  return before;
}

// ------------------------------------------------------------------------------------------ host functions

typedef void* cudaStream_t;
typedef int cudaError_t;

inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return 0;
}

namespace sib_ext::cuda {

struct Device;
inline void check(cudaError_t status, const char* what) {
  if (status != 0) throw std::runtime_error(what);
}

inline unsigned char* block_memory() { return emulation::block->memory.get(); }

template <class... Parameters, class... Arguments>
void launch(const Device&, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            Arguments... arguments) {
  if (threads % emulation::kWarpSize != 0 || threads > 1024) emulation::stop("a block of an impossible size");
  if (blocks < 1 || blocks > INT32_MAX) emulation::stop("a grid of an impossible size");
  emulation::Block block;
  block.fibers = std::vector<emulation::Fiber>(threads);
  block.kernel = [&] { kernel(static_cast<Parameters>(arguments)...); };
  emulation::block_size.x = threads;
  emulation::grid_size.x = static_cast<unsigned>(blocks);
  for (size_t i : emulation::sequence(blocks)) {
    block.memory.reset(new unsigned char[shared_bytes]);
    std::memset(block.memory.get(), 0xff, shared_bytes);
    emulation::block_index.x = static_cast<unsigned>(i);
    emulation::run_block(block);
  }
}

}  // namespace sib_ext::cuda
