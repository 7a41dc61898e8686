// Hutchinson's diagonal on CUDA: a warp makes the signs of 4096 elements with one Philox call a lane (hutchinson.h says
// which bit is whose) and goes through them 256 at a time, 8 a lane, so that it is bound by memory.
#pragma once

#include <cstdint>

#include "philox.cuh"

namespace sensilora {

constexpr int kSignsBlock = 256;
constexpr int kLaneElements = 8;
constexpr int kSignsStep = 32 * kLaneElements;  // elements of a warp at a time
constexpr int kSignsSpan = 32 * 128;            // elements of a warp: a Philox call for each lane

// Eight neighbours, loaded and stored 16 bytes at a time.
template <class T>
struct alignas(16) Eight {
  T at[kLaneElements];
};

template <class T>
__device__ T signed_by(T value, uint32_t signs, int bit) {
  return signs >> bit & 1 ? -value : value;
}

// out += z * hz where kAdd, else out = z, in out's type. kAligned: both pointers are multiples of 16 bytes.
template <class T, class Out, bool kAdd, bool kAligned>
__global__ void __launch_bounds__(kSignsBlock)
    signs_kernel(const T* __restrict__ hz, Out* __restrict__ out, int64_t size, int64_t seed, int64_t offset) {
  __shared__ uint32_t shared[kSignsBlock / 32][128];
  const int lane = threadIdx.x % 32;
  uint32_t* words = shared[threadIdx.x / 32];
  const int64_t span = int64_t{blockIdx.x} * (kSignsBlock / 32) + threadIdx.x / 32;
  const uint64_t call = static_cast<uint64_t>(span) * 32 + lane, probe = static_cast<uint64_t>(offset);
  uint32_t counter[4] = {static_cast<uint32_t>(call), static_cast<uint32_t>(call >> 32), static_cast<uint32_t>(probe),
                         static_cast<uint32_t>(probe >> 32)};
  philox(counter, seed);
#pragma unroll
  for (int w = 0; w < 4; ++w) words[4 * lane + w] = counter[w];
  __syncwarp();

#pragma unroll 4
  for (int step = 0; step < kSignsSpan / kSignsStep; ++step) {
    const int local = step * kSignsStep + lane * kLaneElements;
    const int64_t first = span * kSignsSpan + local;
    const uint32_t signs = words[local / 32] >> local % 32;
    if (kAligned && first + kLaneElements <= size) {
      Eight<Out> to;
      if constexpr (kAdd) {
        const Eight<T> from = *reinterpret_cast<const Eight<T>*>(hz + first);
        to = *reinterpret_cast<const Eight<Out>*>(out + first);
#pragma unroll
        for (int i = 0; i < kLaneElements; ++i) to.at[i] += signed_by(static_cast<Out>(from.at[i]), signs, i);
      } else {
#pragma unroll
        for (int i = 0; i < kLaneElements; ++i) to.at[i] = static_cast<Out>(signed_by(1.0f, signs, i));
      }
      *reinterpret_cast<Eight<Out>*>(out + first) = to;
    } else {
      for (int i = 0; i < kLaneElements && first + i < size; ++i) {
        if constexpr (kAdd)
          out[first + i] += signed_by(static_cast<Out>(hz[first + i]), signs, i);
        else
          out[first + i] = static_cast<Out>(signed_by(1.0f, signs, i));
      }
    }
  }
}

}  // namespace sensilora
