// autocorrelation_diag on CUDA without Triton: one read of x.
#include <algorithm>
#include <optional>

#include "cuda_common.cuh"
// after it
#include "autocorrelation_diag.h"
#include "autocorrelation_diag_kernels.cuh"

namespace sensilora {
namespace {

// Calls fn with how the kernels see x's type.
template <class Fn>
void for_element(ScalarType type, const Fn& fn) {
  switch (type) {
    case ScalarType::Float: return fn(WholeElement<float>{});
    case ScalarType::Double: return fn(WholeElement<double>{});
    case ScalarType::BFloat16: return fn(HalfElement<Bfloat16Bits>{});
    case ScalarType::Half: return fn(HalfElement<HalfBits>{});
    default: STD_TORCH_CHECK(false, "x must be float32, float64, bfloat16 or float16");
  }
}

// How many splits of the rows fill the device with strips * splits blocks, depending on sizes alone.
template <class Kernel>
int64_t splits_for(Kernel kernel, int64_t strips, int64_t rows) {
  int resident = 0;
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, 32 * kSquaresWarps, 0));
  const int64_t most = std::max<int64_t>(1, ceil_div(rows, kSquaresWarps * kSquaresRows));
  return std::clamp<int64_t>(multiprocessors() * resident / strips, 1, most);
}

template <class Sum, class Out>
void add_partials(const Tensor& partial, const Tensor& out, bool accumulate, cudaStream_t stream) {
  const int64_t columns = out.size(0);
  autocorrelation_diag_reduce_kernel<<<grid_size(ceil_div(columns, 32)), 32 * kSumsWarps, 0, stream>>>(
      static_cast<const Sum*>(partial.const_data_ptr()), partial.size(0), columns, accumulate,
      static_cast<Out*>(out.mutable_data_ptr()), out.stride(0));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void autocorrelation_diag(const Tensor& x_tensor, std::optional<Tensor> mask, Tensor out, bool accumulate) {
  const NoGrad guard;
  const DeviceGuard device(x_tensor.get_device_index());
  const DiagArguments arguments(x_tensor, mask, out);
  const Matrix& x = arguments.x;
  if (x.columns == 0) return;
  const cudaStream_t stream = current_stream(x_tensor);
  for_element(x_tensor.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Stored = typename T::Stored;
    using Sum = typename T::Sum;
    const auto* data = x.row<Stored>(0);
    const int64_t count = Columns<Stored>::kCount, strips = ceil_div(x.columns, kStripColumns<Stored>);
    const bool aligned =
        reinterpret_cast<uintptr_t>(data) % 16 == 0 && x.stride % count == 0 && x.columns % count == 0;
    const auto kernel =
        aligned ? autocorrelation_diag_partial_kernel<T, true> : autocorrelation_diag_partial_kernel<T, false>;
    const int64_t rows_per_split = std::max<int64_t>(1, ceil_div(x.rows, splits_for(kernel, strips, x.rows)));
    const int64_t splits = std::max<int64_t>(1, ceil_div(x.rows, rows_per_split));
    const auto sums = std::is_same_v<Sum, double> ? ScalarType::Double : ScalarType::Float;
    const Tensor partial = torch::stable::new_empty(x_tensor, {splits, x.columns}, sums);
    kernel<<<grid_size(strips * splits), 32 * kSquaresWarps, 0, stream>>>(
        data, x.rows, x.columns, x.stride, arguments.counted(), strips, rows_per_split,
        static_cast<Sum*>(partial.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (out.scalar_type() == ScalarType::Double)
      add_partials<Sum, double>(partial, out, accumulate, stream);
    else
      add_partials<Sum, float>(partial, out, accumulate, stream);
  });
}

}  // namespace
}  // namespace sensilora

STABLE_TORCH_LIBRARY_IMPL(sensilora_C, CUDA, m) {
  m.impl("autocorrelation_diag", TORCH_BOX(&sensilora::autocorrelation_diag));
}
