// Hutchinson's diagonal on CUDA without Triton.
#include "cuda_common.cuh"
#include "hutchinson.h"
#include "hutchinson_kernels.cuh"

namespace sensilora {
namespace {

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T, class Out, bool kAdd>
void launch(const T* hz, Out* out, const Tensor& tensor, int64_t seed, int64_t offset) {
  const int64_t size = tensor.numel();
  if (size == 0) return;
  const auto kernel =
      aligned(hz) && aligned(out) ? signs_kernel<T, Out, kAdd, true> : signs_kernel<T, Out, kAdd, false>;
  const int64_t blocks = ceil_div(size, kSignsSpan * (kSignsBlock / 32));
  kernel<<<grid_size(blocks), kSignsBlock, 0, current_stream(tensor)>>>(hz, out, size, seed, offset);
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
