// Asynchronous copies into shared memory and 8x8 blocks out of it, in PTX.
// tests/native/cuda_on_cpu.h defines the guard and has its own, which run anywhere.
#ifndef SENSILORA_SHARED_MEMORY
#define SENSILORA_SHARED_MEMORY

#include <cstdint>

namespace sensilora {

// 16 bytes, or zeros where not `inside`; `from` is then not read. Both addresses are multiples of 16.
__device__ inline void copy_async(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}

// Ends a group of this thread's copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kGroups of this thread's groups are on their way; a barrier must follow.
template <int kGroups>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Four blocks of 8x8 16-bit elements; lane 8 i + j says where row j of block i lies (16 bytes). Lane 4 g + t gets of
// block i the columns 2t, 2t + 1 of row g in words[i]; kTransposed: the rows 2t, 2t + 1 of column g.
template <bool kTransposed>
__device__ inline void load_blocks(uint32_t (&words)[4], const void* row) {
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(at)
                 : "memory");
}

}  // namespace sensilora

#endif
