// Runs CUDA kernels on the CPU, slowly: a fiber a thread, one block after the other. For checks of index arithmetic
// where there is no GPU. Only what csrc/*.cuh use is here; include it before them.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define SENSILORA_DYNAMIC_SHARED(name) static uint32_t name[64 * 1024 / sizeof(uint32_t)]

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

namespace cuda_on_cpu {

struct Copy {
  void* to;
  const void* from;
  bool inside;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 * 1024);
  bool done = false;
  std::vector<std::vector<Copy>> copies;  // by group; the last one is still open
};

// What lanes tell one another. A lane is at most one exchange ahead of another, so two sets of slots suffice.
struct Warp {
  int arrived = 0;
  unsigned turn = 0;
  uint32_t slots[2][32][6];
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::function<void()> body;
inline int block_arrived = 0, alive = 0;
inline unsigned block_turn = 0;

inline void yield() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

// Gives `values` to the other lanes and returns everyone's.
template <int kCount>
const uint32_t (*exchange(const uint32_t (&values)[kCount]))[6] {
  Warp& warp = warps[threadIdx.x / 32];
  const unsigned turn = warp.turn;
  std::memcpy(warp.slots[turn % 2][threadIdx.x % 32], values, sizeof(values));
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.turn;
  }
  while (warp.turn == turn) yield();
  return warp.slots[turn % 2];
}

inline void start() {
  body();
  fibers[threadIdx.x].done = true;
  --alive;
}

template <class Kernel, class... Args>
void launch(Kernel kernel, int64_t blocks, int threads, Args... args) {
  body = [=] { kernel(args...); };
  gridDim.x = static_cast<unsigned>(blocks);
  fibers.resize(threads);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    warps.assign(threads / 32, Warp{});
    alive = threads;
    block_arrived = 0;
    for (Fiber& fiber : fibers) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler;
      fiber.done = false;
      fiber.copies.assign(1, {});
      makecontext(&fiber.context, start, 0);
    }
    while (alive > 0)
      for (int thread = 0; thread < threads; ++thread)
        if (!fibers[thread].done) {
          threadIdx.x = thread;
          swapcontext(&scheduler, &fibers[thread].context);
        }
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() {
  using namespace cuda_on_cpu;
  const unsigned turn = block_turn;
  if (++block_arrived == alive) {
    block_arrived = 0;
    ++block_turn;
  }
  while (block_turn == turn) yield();
}

inline void __syncwarp() { cuda_on_cpu::exchange<1>({0}); }

inline uint32_t __shfl_xor_sync(uint32_t, uint32_t value, int lanes) {
  const unsigned lane = threadIdx.x % 32;
  return cuda_on_cpu::exchange<1>({value})[lane ^ lanes][0];
}

template <class T>
T __ldcs(const T* at) {
  return *at;
}

// Threads take turns only where they wait, so nothing comes in between.
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}

inline int __shfl_sync(uint32_t, int value, int lane) {
  return static_cast<int>(cuda_on_cpu::exchange<1>({static_cast<uint32_t>(value)})[lane][0]);
}

// A lane without another one `lanes` below it gets its own value.
inline int __shfl_up_sync(uint32_t, int value, int lanes) {
  const int lane = threadIdx.x % 32;
  const auto* all = cuda_on_cpu::exchange<1>({static_cast<uint32_t>(value)});
  return static_cast<int>(all[lane < lanes ? lane : lane - lanes][0]);
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
  return result;
}

#define SENSILORA_SHARED_MEMORY
namespace sensilora {

// Nothing arrives before it is waited for.
inline void copy_async(void* to, const void* from, bool inside) {
  cuda_on_cpu::fibers[threadIdx.x].copies.back().push_back({to, from, inside});
}
inline void commit_copies() { cuda_on_cpu::fibers[threadIdx.x].copies.emplace_back(); }
template <int kGroups>
void wait_for_copies() {
  auto& groups = cuda_on_cpu::fibers[threadIdx.x].copies;
  while (groups.size() > kGroups + 1) {
    for (const auto& copy : groups.front()) {
      if (copy.inside)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

template <bool kTransposed>
void load_blocks(uint32_t (&words)[4], const void* row) {
  const auto address = reinterpret_cast<uint64_t>(row);
  if (address % 16 != 0) std::abort();
  const auto* rows = cuda_on_cpu::exchange<2>({static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)});
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](int r, int column) -> uint32_t {
      const uint64_t at = uint64_t{rows[8 * i + r][1]} << 32 | rows[8 * i + r][0];
      return reinterpret_cast<const uint16_t*>(at)[column];
    };
    words[i] = kTransposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                           : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
  }
}

}  // namespace sensilora

#define SENSILORA_HALF_TYPES
namespace sensilora {

// mma.m16n8k16 as the PTX manual lays its operands over the lanes.
template <class T>
void mma_on_cpu(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const int lane = threadIdx.x % 32;
  const auto* all = cuda_on_cpu::exchange<6>({a0, a1, a2, a3, b0, b1});
  const auto half = [](uint32_t pair, int i) { return i ? T::high(pair) : T::low(pair); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float a = half(all[4 * (row % 8) + k % 8 / 2][row / 8 + 2 * (k / 8)], k % 2);
      const float b = half(all[4 * column + k % 8 / 2][4 + k / 8], k % 2);
      d[i] += a * b;
    }
  }
}

struct Bfloat16Bits {
  static float low(uint32_t pair) { return __uint_as_float(pair << 16); }
  static float high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }
  static uint32_t round(float value) {  // to nearest even; NaN aside
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  }
  static uint32_t pack(float low, float high) { return round(low) | round(high) << 16; }
  template <class... Registers>
  static void mma(float (&d)[4], Registers... registers) {
    mma_on_cpu<Bfloat16Bits>(d, registers...);
  }
};

struct HalfBits {
  static float low(uint32_t pair) {
    const auto bits = static_cast<uint16_t>(pair);
    _Float16 value;
    std::memcpy(&value, &bits, sizeof(value));
    return static_cast<float>(value);
  }
  static float high(uint32_t pair) { return low(pair >> 16); }
  static uint32_t round(float value) {
    const auto half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, sizeof(bits));
    return bits;
  }
  static uint32_t pack(float low, float high) { return round(low) | round(high) << 16; }
  template <class... Registers>
  static void mma(float (&d)[4], Registers... registers) {
    mma_on_cpu<HalfBits>(d, registers...);
  }
};

}  // namespace sensilora
