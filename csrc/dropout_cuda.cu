// The dropout of the LoRA input on its own: what the products of wide ranks and types without a fused pass read.
#include "cuda_common.cuh"
#include "dropout.h"
#include "philox.cuh"

namespace sensilora {
namespace {

constexpr int kBlock = 256;

// A thread has 8 columns of a row; `spans` of 32 columns cover a row. In double where T is, else in float.
template <class T, bool kAdd>
__global__ void __launch_bounds__(kBlock)
    dropout_kernel(const T* __restrict__ x, int64_t stride, T* __restrict__ out, int64_t rows, int64_t columns,
                   int64_t spans, Dropout dropout, double scale) {
  using A = accumulate_t<T>;
  const int64_t index = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  const int64_t row = index / (4 * spans), block = index % (4 * spans);
  // All lanes take part, those beyond the last row too.
  const Kept kept = kept_columns<1>(*dropout.seed, dropout.thresholds, row, static_cast<uint32_t>(block));
  if (row >= rows) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t column = 8 * block + i;
    if (column >= columns) break;
    const bool keep = kept.pair[i / 2] >> (16 * (i % 2)) & 1;
    const A value = keep ? static_cast<A>(x[row * stride + column]) * static_cast<A>(scale) : A{0};
    T& to = out[row * columns + column];
    to = static_cast<T>(kAdd ? static_cast<A>(to) + value : value);
  }
}

template <bool kAdd>
void drop_into(const Tensor& x_tensor, const Tensor& out, double p, const int64_t* seed) {
  const Matrix x = as_matrix(x_tensor, "x");
  if (x.rows == 0 || x.columns == 0) return;
  const uint32_t threshold = dropout_threshold(p);
  const int64_t spans = ceil_div(x.columns, 32);
  for_floating_type(out.scalar_type(), "x", [&](auto tag) {
    using T = decltype(tag);
    dropout_kernel<T, kAdd><<<grid_size(ceil_div(x.rows * 4 * spans, kBlock)), kBlock, 0, current_stream(out)>>>(
        x.row<T>(0), x.stride, static_cast<T*>(out.mutable_data_ptr()), x.rows, x.columns, spans,
        make_dropout(seed, threshold), dropout_scale(threshold));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

Tensor dropout(const Tensor& x, double p, const Tensor& seed) {
  const NoGrad no_grad;
  const DeviceGuard device(x.get_device_index());
  const int64_t* key = seed_pointer(seed, p, x);
  return key == nullptr ? torch::stable::clone(x) : dropped_cuda(x, p, key);
}

}  // namespace

Tensor dropped_cuda(const Tensor& x, double p, const int64_t* seed) {
  if (!drops_any(p)) return x;
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  drop_into<false>(x, out, p, seed);
  return out;
}

void add_dropped_cuda(const Tensor& into, const Tensor& x, double p, const int64_t* seed) {
  drop_into<true>(x, into, p, seed);
}

}  // namespace sensilora

STABLE_TORCH_LIBRARY_IMPL(sensilora_C, CUDA, m) { m.impl("dropout", TORCH_BOX(&sensilora::dropout)); }
