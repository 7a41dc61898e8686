// The two 16-bit types as bit patterns, and what is done with them in PTX.
// tests/native/cuda_on_cpu.h defines the guard and has its own, which run anywhere.
#ifndef SENSILORA_HALF_TYPES
#define SENSILORA_HALF_TYPES

#include <cstdint>

namespace sensilora {

// d (16, 8) += a (16, 16) b (16, 8). With lane = 4 g + t, a lane holds of a the rows g (a0, a2) and g + 8 (a1, a3) at
// k = 2t, 2t + 1 (a0, a1) and 2t + 8, 2t + 9 (a2, a3); of b the column g at the same k (b0, b1); and of d the columns
// 2t, 2t + 1 in row g (d[0], d[1]) and row g + 8 (d[2], d[3]). k may be numbered otherwise as long as a and b agree.
#define SENSILORA_MMA(TYPE)                                                                                 \
  static __device__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, \
                             uint32_t b1) {                                                                 \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                              \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                              \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                    \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                            \
  }

struct Bfloat16Bits {
  static __device__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
  static __device__ float high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }
  static __device__ uint32_t pack(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  SENSILORA_MMA("bf16")
};

struct HalfBits {
  static __device__ float low(uint32_t pair) {
    float value;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(value) : "r"(pair));
    return value;
  }
  static __device__ float high(uint32_t pair) { return low(pair >> 16); }
  static __device__ uint32_t pack(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  SENSILORA_MMA("f16")
};

#undef SENSILORA_MMA

}  // namespace sensilora

#endif
