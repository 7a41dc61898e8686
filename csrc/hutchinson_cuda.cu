// Hutchinson's diagonal on CUDA without Triton. A warp makes the signs of 4096 elements with one Philox call a lane and
// goes through them 256 at a time, 8 a lane, so that it is bound by memory.
#include "cuda_common.cuh"
#include "hutchinson.h"
#include "philox.cuh"

namespace sensilora {
namespace {

constexpr int kBlock = 256;
constexpr int kLaneElements = 8;
constexpr int kStep = 32 * kLaneElements;
constexpr int kSpan = 32 * 128;  // elements of a warp

// Eight neighbours, loaded and stored 16 bytes at a time.
template <class T>
struct alignas(16) Eight {
  T value[kLaneElements];
};

template <class A>
__device__ A signed_by(A value, uint32_t signs, int bit) {
  return signs >> bit & 1 ? -value : value;
}

// Turns elements [first, first + 8) of `out` as `set(element, signs, its bit)` says, for every 8 elements. kAligned: all
// pointers are multiples of 16 bytes.
template <class T, class Out, bool kAdd, bool kAligned>
__global__ void __launch_bounds__(kBlock)
    signs_kernel(const T* __restrict__ hz, Out* __restrict__ out, int64_t size, int64_t seed, int64_t offset) {
  __shared__ uint32_t shared[kBlock / 32][128];
  const int lane = threadIdx.x % 32;
  uint32_t* words = shared[threadIdx.x / 32];
  const int64_t span = int64_t{blockIdx.x} * (kBlock / 32) + threadIdx.x / 32;
  const uint64_t call = static_cast<uint64_t>(span) * 32 + lane, high = static_cast<uint64_t>(offset);
  uint32_t counter[4] = {static_cast<uint32_t>(call), static_cast<uint32_t>(call >> 32), static_cast<uint32_t>(high),
                         static_cast<uint32_t>(high >> 32)};
  philox(counter, seed);
#pragma unroll
  for (int w = 0; w < 4; ++w) words[4 * lane + w] = counter[w];
  __syncwarp();

  using A = accumulate_t<Out>;
#pragma unroll 4
  for (int step = 0; step < kSpan / kStep; ++step) {
    const int local = step * kStep + lane * kLaneElements;
    const int64_t first = span * kSpan + local;
    const uint32_t signs = words[local / 32] >> local % 32;
    if (kAligned && first + kLaneElements <= size) {
      Eight<T> from;
      Eight<Out> to;
      if (kAdd) {
        from = *reinterpret_cast<const Eight<T>*>(hz + first);
        to = *reinterpret_cast<const Eight<Out>*>(out + first);
      }
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i)
        to.value[i] = kAdd ? to.value[i] + signed_by(static_cast<Out>(from.value[i]), signs, i)
                           : static_cast<Out>(signed_by(A{1}, signs, i));
      *reinterpret_cast<Eight<Out>*>(out + first) = to;
    } else {
      for (int i = 0; i < kLaneElements && first + i < size; ++i)
        out[first + i] = kAdd ? out[first + i] + signed_by(static_cast<Out>(hz[first + i]), signs, i)
                              : static_cast<Out>(signed_by(A{1}, signs, i));
    }
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T, class Out, bool kAdd>
void launch(const T* hz, Out* out, const Tensor& tensor, int64_t seed, int64_t offset) {
  const int64_t size = tensor.numel();
  if (size == 0) return;
  const auto kernel =
      aligned(hz) && aligned(out) ? signs_kernel<T, Out, kAdd, true> : signs_kernel<T, Out, kAdd, false>;
  kernel<<<grid_size(ceil_div(size, kSpan * (kBlock / 32))), kBlock, 0, current_stream(tensor)>>>(hz, out, size, seed,
                                                                                                  offset);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void hutchinson_accumulate(const Tensor& hz, Tensor out, int64_t seed, int64_t offset) {
  check_accumulation(hz, out);
  const DeviceGuard device(out.get_device_index());
  for_floating_type(hz.scalar_type(), "hz", [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(hz.const_data_ptr());
    if (out.scalar_type() == ScalarType::Double)
      launch<T, double, true>(from, static_cast<double*>(out.mutable_data_ptr()), out, seed, offset);
    else
      launch<T, float, true>(from, static_cast<float*>(out.mutable_data_ptr()), out, seed, offset);
  });
}

void rademacher(Tensor out, int64_t seed, int64_t offset) {
  check_signs(out);
  const DeviceGuard device(out.get_device_index());
  for_floating_type(out.scalar_type(), "out", [&](auto tag) {
    using T = decltype(tag);
    launch<T, T, false>(nullptr, static_cast<T*>(out.mutable_data_ptr()), out, seed, offset);
  });
}

}  // namespace
}  // namespace sensilora

STABLE_TORCH_LIBRARY_IMPL(sensilora_C, CUDA, m) {
  m.impl("hutchinson_accumulate", TORCH_BOX(&sensilora::hutchinson_accumulate));
  m.impl("rademacher", TORCH_BOX(&sensilora::rademacher));
}
