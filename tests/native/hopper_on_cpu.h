// What csrc/hopper.cuh has, on the CPU: copies of tiles, barriers, clusters and products of warpgroups, with shared
// memory laid out as the PTX manual has it. The two blocks of a cluster run side by side. What is asynchronous happens
// either at once or, where `late`, as late as it may: copies in any order at any later time, products when they are
// waited for, and threads run in any order. A kernel that gives the same both ways waits for all it needs.
#pragma once

#include <algorithm>
#include <map>
#include <numeric>
#include <random>

#include "cuda_on_cpu.h"

#define SENSILORA_HOPPER
#define __CUDA_ARCH_FEAT_SM90_ALL
#define __grid_constant__

using std::min;

// A matrix of 16-bit numbers that is copied in boxes of 64 columns.
struct CUtensorMap {
  const uint16_t* data;
  int rows, columns, stride, box_rows;
};

namespace hopper_on_cpu {

constexpr int kBlocks = 2, kSharedBytes = 227 * 1024;

struct Barrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;  // expected and not yet copied; fewer than none where copies came first
  uint32_t phase = 0;

  void settle() {
    if (pending > 0 || bytes != 0) return;
    pending = arrivals;
    ++phase;
  }
};

// What a warpgroup multiplies: it is done when one of its threads waits for it and all of them have asked for it.
struct Group {
  std::vector<std::function<void()>> products;
  int commits = 0;
};

struct Warpgroup {
  std::vector<Group> groups;
  std::vector<size_t> committed = std::vector<size_t>(128);  // by each thread
  size_t done = 0;
};

struct Block {
  std::vector<uint8_t> shared;
  std::map<uint32_t, Barrier> barriers;
  std::map<int, std::pair<int, unsigned>> named;  // arrived and turn of the barriers of a warpgroup
  std::map<int, Warpgroup> warpgroups;
};

inline std::vector<Block> blocks;
inline std::vector<cuda_on_cpu::Fiber> fibers;
inline int threads = 0, arrived = 0;
inline unsigned turn = 0;
inline std::function<void()> body;
inline bool late = false;
inline std::vector<std::function<void()>> copies;  // that have not arrived
inline std::mt19937 generator(1);

inline int rank() { return blockIdx.x % kBlocks; }
inline cuda_on_cpu::Fiber& fiber() { return fibers[rank() * threads + threadIdx.x]; }
inline void yield() { swapcontext(&fiber().context, &cuda_on_cpu::scheduler); }
inline void start() {
  body();
  fiber().done = true;
}

// Where 16 bytes of a tile lie: the copy engine exchanges those of each row of 128 bytes.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline uint8_t* at(int block, uint32_t address, uint32_t bytes) {
  if (address + bytes > kSharedBytes) {
    std::printf("shared memory of %d bytes, read or written at %u\n", kSharedBytes, address);
    std::exit(1);
  }
  return &blocks[block].shared[address];
}

inline Barrier& barrier(int block, uint32_t address) {
  const auto found = blocks[block].barriers.find(address);
  if (found == blocks[block].barriers.end()) {
    std::printf("no barrier at %u\n", address);
    std::exit(1);
  }
  return found->second;
}

inline void copy_now(int block, uint32_t to, const CUtensorMap& map, int column, int row, uint32_t ready) {
  for (int r = 0; r < map.box_rows; ++r)
    for (int c = 0; c < 64; ++c) {
      const int from_row = row + r, from_column = column + c;
      const bool inside = from_row >= 0 && from_row < map.rows && from_column < map.columns;
      const uint16_t value = inside ? map.data[int64_t{from_row} * map.stride + from_column] : 0;
      std::memcpy(at(block, swizzled(to + r * 128 + c / 8 * 16) + c % 8 * 2, 2), &value, 2);
    }
  Barrier& there = barrier(block, ready);
  there.bytes -= map.box_rows * 128;
  there.settle();
}

inline void copy(int block, uint32_t to, const CUtensorMap& map, int column, int row, uint32_t ready) {
  if (!late) return copy_now(block, to, map, column, row, ready);
  copies.push_back([=] { copy_now(block, to, map, column, row, ready); });
}

// Some of the copies that have not arrived.
inline void deliver() {
  std::shuffle(copies.begin(), copies.end(), generator);
  for (size_t some = (copies.size() + 2) / 3; some > 0; --some) {
    copies.back()();
    copies.pop_back();
  }
}

inline Warpgroup& warpgroup() { return blocks[rank()].warpgroups[threadIdx.x / 128]; }

// This thread's open group.
inline Group& open_group() {
  Warpgroup& own = warpgroup();
  const size_t index = own.committed[threadIdx.x % 128];
  if (own.groups.size() <= index) own.groups.resize(index + 1);
  return own.groups[index];
}

inline void wait_for_products(size_t but) {
  Warpgroup& own = warpgroup();
  const size_t committed = own.committed[threadIdx.x % 128], wanted = committed > but ? committed - but : 0;
  while (own.done < wanted) {
    if (own.groups[own.done].commits < 128) {
      yield();
      continue;
    }
    for (const auto& product : own.groups[own.done].products) product();
    own.groups[own.done].products.clear();
    ++own.done;
  }
}

// Runs a kernel in clusters of two blocks, one cluster after the other. Shared memory begins with NaN in it.
template <class Kernel, class... Args>
void launch(Kernel kernel, int64_t count, int block_threads, Args... args) {
  threads = block_threads;
  body = [=] { kernel(args...); };
  gridDim.x = static_cast<unsigned>(count);
  fibers.resize(kBlocks * threads);
  for (unsigned cluster = 0; cluster < count / kBlocks; ++cluster) {
    blocks.assign(kBlocks, {std::vector<uint8_t>(kSharedBytes, 0xFF), {}, {}, {}});
    arrived = 0;
    std::vector<int> order(kBlocks * threads);
    std::iota(order.begin(), order.end(), 0);
    for (auto& one : fibers) {
      getcontext(&one.context);
      one.context.uc_stack.ss_sp = one.stack.data();
      one.context.uc_stack.ss_size = one.stack.size();
      one.context.uc_link = &cuda_on_cpu::scheduler;
      one.done = false;
      makecontext(&one.context, start, 0);
    }
    for (bool running = true; running;) {
      running = false;
      if (late) {
        deliver();
        std::shuffle(order.begin(), order.end(), generator);
      }
      for (const int i : order) {
        if (fibers[i].done) continue;
        running = true;
        blockIdx.x = cluster * kBlocks + i / threads;
        threadIdx.x = i % threads;
        swapcontext(&cuda_on_cpu::scheduler, &fibers[i].context);
      }
    }
    if (!copies.empty()) {
      std::printf("%zu copies had not arrived at the end\n", copies.size());
      std::exit(1);
    }
  }
}

}  // namespace hopper_on_cpu

namespace sensilora {

inline uint32_t dynamic_shared() { return 48; }  // any place

inline void barrier_init(uint32_t barrier, int arrivals) {
  hopper_on_cpu::blocks[hopper_on_cpu::rank()].barriers[barrier] = {arrivals, arrivals};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier, int rank) {
  auto& there = hopper_on_cpu::barrier(rank, barrier);
  --there.pending;
  there.settle();
}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  hopper_on_cpu::barrier(hopper_on_cpu::rank(), barrier).bytes += bytes;
  barrier_arrive(barrier, hopper_on_cpu::rank());
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  while (hopper_on_cpu::barrier(hopper_on_cpu::rank(), barrier).phase % 2 == parity) hopper_on_cpu::yield();
}

inline int cluster_rank() { return hopper_on_cpu::rank(); }
inline void cluster_sync() {
  using namespace hopper_on_cpu;
  const unsigned before = turn;
  if (++arrived == kBlocks * threads) {
    arrived = 0;
    ++turn;
  }
  while (turn == before) yield();
}
inline void warpgroup_sync(int barrier) {
  auto& [count, turn] = hopper_on_cpu::blocks[hopper_on_cpu::rank()].named[barrier];
  const unsigned before = turn;
  if (++count == 128) {
    count = 0;
    ++turn;
  }
  while (turn == before) hopper_on_cpu::yield();
}

inline void copy_tile(uint32_t to, const CUtensorMap& map, int column, int row, uint32_t barrier) {
  hopper_on_cpu::copy(hopper_on_cpu::rank(), to, map, column, row, barrier);
}
inline void copy_tile_to(uint16_t blocks, uint32_t to, const CUtensorMap& map, int column, int row, uint32_t barrier) {
  for (int block = 0; block < hopper_on_cpu::kBlocks; ++block)
    if (blocks >> block & 1) hopper_on_cpu::copy(block, to, map, column, row, barrier);
}

inline void clear_shared(uint32_t address) {
  std::memset(hopper_on_cpu::at(hopper_on_cpu::rank(), address, 16), 0, 16);
}
inline void shared_to_async() {}

inline void products_begin() {}
inline void products_commit() {
  ++hopper_on_cpu::open_group().commits;
  ++hopper_on_cpu::warpgroup().committed[threadIdx.x % 128];
}
template <int kGroups>
void products_wait() {
  hopper_on_cpu::wait_for_products(kGroups);
}
template <int kSize>
void products_done(float (&)[kSize]) {}
template <int kCount>
void registers_down() {}
template <int kCount>
void registers_up() {}

// Where element k, m of an operand is that has a row of 64 m for each k. Of a descriptor the bits 0 to 13 are the
// address, 16 to 29 the distance of tiles of 64 m, 32 to 45 that of eight k, all in units of 16 bytes; the top two say
// how tiles are swizzled.
inline uint32_t operand_address(uint64_t descriptor, int k, int m) {
  if (descriptor >> 62 != 1) {
    std::printf("tiles are not swizzled by 128 bytes\n");
    std::exit(1);
  }
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3FFF) << 4; };
  return hopper_on_cpu::swizzled(field(0) + m / 64 * field(16) + k / 8 * field(32) + k % 8 * 128 + m % 64 / 8 * 16) +
         m % 8 * 2;
}

template <class T>
struct ProductsOnCpu {
  template <int kSums>
  static void multiply(float (&d)[kSums], uint64_t a, uint64_t b, int add) {
    const int block = hopper_on_cpu::rank(), thread = threadIdx.x % 128;
    const auto product = [&d, a, b, add, block, thread] { multiply_now(d, a, b, add, block, thread); };
    if (!hopper_on_cpu::late) return product();
    hopper_on_cpu::open_group().products.push_back(product);
  }

 private:
  template <int kSums>
  static void multiply_now(float (&d)[kSums], uint64_t a, uint64_t b, int add, int block, int thread) {
    const auto value = [=](uint64_t descriptor, int k, int m) {
      uint16_t bits;
      std::memcpy(&bits, hopper_on_cpu::at(block, operand_address(descriptor, k, m), 2), 2);
      return T::low(bits);
    };
    const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    float left[2][16];
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k) left[half][k] = value(a, k, row + 8 * half);
    for (int i = 0; i < kSums / 4; ++i)
      for (int j = 0; j < 2; ++j) {
        float sums[2] = {};
        for (int k = 0; k < 16; ++k) {
          const float right = value(b, k, column + 8 * i + j);
          for (int half = 0; half < 2; ++half) sums[half] += left[half][k] * right;
        }
        for (int half = 0; half < 2; ++half) {
          float& sum = d[4 * i + 2 * half + j];
          sum = add != 0 ? sum + sums[half] : sums[half];
        }
      }
  }
};
using Bfloat16Products = ProductsOnCpu<Bfloat16Bits>;
using HalfProducts = ProductsOnCpu<HalfBits>;

}  // namespace sensilora
