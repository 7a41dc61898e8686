// Hopper's own instructions in PTX: the bulk tensor copy engine (TMA), barriers in shared memory, clusters, and
// products of whole warpgroups (wgmma), which exist in code for sm_90a alone.
#pragma once

#include <cstdint>

namespace sensilora {

// How the tensor cores find an operand: tiles of 64 columns, each of rows of 128 bytes that the copy engine swizzled,
// `tile_bytes` apart. 16 rows, one product's, are 2048 bytes.
__device__ inline uint64_t operand_descriptor(uint32_t address, uint32_t tile_bytes) {
  constexpr uint64_t kSwizzled128 = 1, kEightRows = 1024;
  return (address & 0x3FFFF) >> 4 | static_cast<uint64_t>(tile_bytes >> 4) << 16 | kEightRows >> 4 << 32 |
         kSwizzled128 << 62;
}

}  // namespace sensilora

// tests/native/hopper_on_cpu.h defines the guard and has its own, which run anywhere.
#ifndef SENSILORA_HOPPER
#define SENSILORA_HOPPER

#include <cuda.h>

namespace sensilora {

// The address of the dynamic shared memory; all that is below names shared memory by such addresses.
__device__ inline uint32_t dynamic_shared() {
  extern __shared__ char shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// --- barriers in shared memory

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the initialised barriers known to the copy engine and to the other blocks of the cluster.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and expects `bytes` more to be copied before the phase ends.
__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the barrier at the same place in the shared memory of block `rank` of the cluster.
__device__ inline void barrier_arrive(uint32_t barrier, int rank) {
  asm volatile(
      "{.reg .b32 there;"
      "mapa.shared::cluster.u32 there, %0, %1;"
      "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Waits until the phase of this parity has ended.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred done;"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;"
      "@!done bra again;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// --- clusters

__device__ inline int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}

// --- copies of a tile (box) of a matrix into shared memory; what lies outside of the matrix becomes zeros

__device__ inline void copy_tile(uint32_t to, const CUtensorMap& map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same into the shared memory of all blocks of the cluster that `blocks` has a bit for.
__device__ inline void copy_tile_to(uint16_t blocks, uint32_t to, const CUtensorMap& map, int column, int row,
                                    uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

// Sets 16 bytes of shared memory to zero; after shared_to_async the tensor cores see it.
__device__ inline void clear_shared(uint32_t address) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}
__device__ inline void shared_to_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Waits for the other threads of a warpgroup; each of them has a `barrier` of its own, of 1 to 15.
__device__ inline void warpgroup_sync(int barrier) { asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory"); }

// --- products of a warpgroup

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kGroups>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

#define SENSILORA_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SENSILORA_SUMS_16(i) \
  SENSILORA_SUMS_4(i), SENSILORA_SUMS_4(i + 4), SENSILORA_SUMS_4(i + 8), SENSILORA_SUMS_4(i + 12)
#define SENSILORA_SUMS_32(i) SENSILORA_SUMS_16(i), SENSILORA_SUMS_16(i + 16)
#define SENSILORA_NAMES_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SENSILORA_NAMES_96 \
  SENSILORA_NAMES_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
// The operands are numbered as they come: the sums that NAMES has, then a, b and add.
#define SENSILORA_WGMMA(TYPE, COLUMNS, NAMES, A, B, ADD, ...)                                                   \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD ", 0;"                                                      \
               "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" NAMES "}, " A ", " B   \
               ", p, 1, 1, 1, 1;}"                                                                              \
               : __VA_ARGS__                                                                                    \
               : "l"(a), "l"(b), "r"(add))

// d (64, columns) = or += a b for a stored as (16, 64), b as (16, columns), where `add` is 0 or not. Warp w of the
// warpgroup holds the rows from 16 w on; lane 4 g + t of it has the columns 8 i + 2t and 8 i + 2t + 1, of row g in
// d[4 i] and d[4 i + 1], of row g + 8 in d[4 i + 2] and d[4 i + 3].
#define SENSILORA_PRODUCTS(NAME, TYPE)                                                                      \
  struct NAME {                                                                                             \
    static __device__ void multiply(float (&d)[64], uint64_t a, uint64_t b, int add) {                      \
      SENSILORA_WGMMA(TYPE, "128", SENSILORA_NAMES_64, "%64", "%65", "%66", SENSILORA_SUMS_32(0),           \
                      SENSILORA_SUMS_32(32));                                                               \
    }                                                                                                       \
    static __device__ void multiply(float (&d)[96], uint64_t a, uint64_t b, int add) {                      \
      SENSILORA_WGMMA(TYPE, "192", SENSILORA_NAMES_96, "%96", "%97", "%98", SENSILORA_SUMS_32(0),           \
                      SENSILORA_SUMS_32(32), SENSILORA_SUMS_32(64));                                        \
    }                                                                                                       \
  }
SENSILORA_PRODUCTS(Bfloat16Products, "bf16");
SENSILORA_PRODUCTS(HalfProducts, "f16");
#undef SENSILORA_PRODUCTS
#undef SENSILORA_WGMMA
#undef SENSILORA_NAMES_96
#undef SENSILORA_NAMES_64
#undef SENSILORA_SUMS_32
#undef SENSILORA_SUMS_16
#undef SENSILORA_SUMS_4

// Keeps the compiler from using sums before the products are done.
template <int kSize>
__device__ inline void products_done(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Registers of each thread of a warpgroup, from those that the kernel was launched with on.
template <int kCount>
__device__ inline void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ inline void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace sensilora

#endif
