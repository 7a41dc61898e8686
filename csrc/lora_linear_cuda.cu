// lora_linear on CUDA without Triton. The products with W are cuBLAS's. For 16-bit activations and ranks up to 64 the
// rest are four passes over the activations (lora_linear_kernels.cuh):
//
//   forward    h = drop(x) A^T               one read of x
//              y += s h B^T                  one read and write of y
//   backward   q = s dY B, dB = s dY^T h     one read of dY
//              dA = q^T drop(x), dx += kept∘(q A)   one read of x, one read and write of dx
//
// Small launches beside them bring A, B and h to 16 bits and a padded rank, and add up partial sums. Wider ranks and
// other types are products throughout: they are no longer bound by the activations' bytes.
#include <algorithm>
#include <optional>
#include <tuple>

#include "cuda_common.cuh"
#include "dropout.h"
#include "lora_linear.h"
#include "lora_linear_kernels.cuh"
#include "products_cuda.cuh"

namespace sensilora {
namespace {

struct Cuda {
  static constexpr auto& addmm_into = addmm_into_cuda;
  static constexpr auto& mm_into = mm_into_cuda;
  static Tensor dropped(const Tensor& x, double p, const std::optional<Tensor>& seed) {
    return dropped_cuda(x, p, seed_pointer(seed, p, x));
  }
  static void add_dropped(const Tensor& into, const Tensor& x, double p, const std::optional<Tensor>& seed) {
    add_dropped_cuda(into, x, p, seed_pointer(seed, p, x));
  }
};

constexpr int64_t kMostRanks = 64;
// Tiles of rows that a split of the gradient kernels has at least: fewer would not pay for its partial sums.
constexpr int64_t kLeastTiles = 4;

bool is_16_bit(const Tensor& x) {
  return x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half;
}

// Whether the passes of this file serve; if not, the products do.
bool passes_serve(const Tensor& x, const LoraShape& shape) {
  constexpr int64_t kMostColumns = 0x7FFF0000;  // columns are counted in 32 bits, in steps of up to 512
  return is_16_bit(x) && shape.rank > 0 && shape.rank <= kMostRanks && shape.tokens > 0 && shape.in > 0 &&
         shape.out > 0 && shape.in < kMostColumns && shape.out < kMostColumns;
}

// The rank that the passes are compiled for.
int64_t padded_rank(int64_t rank) { return rank <= 16 ? 16 : rank <= 32 ? 32 : 64; }
int64_t padded_columns(int64_t columns) { return ceil_div(columns, kTileColumns) * kTileColumns; }

// Calls fn with the 16-bit type and the padded rank as types.
template <int kValue>
using Int = std::integral_constant<int, kValue>;

template <class Fn>
void for_type_and_ranks(const Tensor& x, int64_t rank, const Fn& fn) {
  const auto with = [&](auto type) {
    if (rank <= 16) return fn(type, Int<16>{});
    if (rank <= 32) return fn(type, Int<32>{});
    return fn(type, Int<64>{});
  };
  if (x.scalar_type() == ScalarType::BFloat16) return with(Bfloat16Bits{});
  return with(HalfBits{});
}

template <class Fn>
void for_bools(bool first, bool second, const Fn& fn) {
  const auto with = [&](auto one) {
    if (second) return fn(one, std::true_type{});
    return fn(one, std::false_type{});
  };
  if (first) return with(std::true_type{});
  return with(std::false_type{});
}

Kind kind_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Kind::kFloat;
    case ScalarType::Double: return Kind::kDouble;
    case ScalarType::BFloat16: return Kind::kBfloat16;
    case ScalarType::Half: return Kind::kHalf;
    default: STD_TORCH_CHECK(false, "lora_A and lora_B must be float32, float64, bfloat16 or float16");
  }
  return Kind::kFloat;
}

const uint16_t* bits(const Tensor& tensor) { return static_cast<const uint16_t*>(tensor.const_data_ptr()); }
uint16_t* mutable_bits(const Tensor& tensor) { return static_cast<uint16_t*>(tensor.mutable_data_ptr()); }
float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

template <class Element>
bool rows_aligned(const Rows<Element>& rows) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride % 8 == 0 && rows.columns % 8 == 0;
}

Rows<const uint16_t> rows_of(const Matrix& matrix) {
  return {matrix.row<uint16_t>(0), matrix.rows, matrix.stride, static_cast<int>(matrix.columns)};
}
Rows<uint16_t> rows_of_new(const Tensor& matrix) {
  return {mutable_bits(matrix), matrix.size(0), matrix.size(1), static_cast<int>(matrix.size(1))};
}

// A zero-padded 16-bit copy of `matrix`, made by a job that is added to `jobs`.
Tensor packed(Jobs<PackJob>& jobs, const Tensor& matrix, const Tensor& like, int64_t rows, int64_t columns) {
  Tensor to = torch::stable::new_empty(like, {rows, columns});
  jobs.add({matrix.const_data_ptr(), kind_of(matrix), matrix.size(0), matrix.size(1), matrix.stride(0),
            matrix.stride(1), mutable_bits(to), rows, columns});
  return to;
}

template <class T, class Job>
void launch(const Jobs<Job>& jobs, cudaStream_t stream) {
  jobs_kernel<T, Job><<<grid_size(jobs.blocks()), Jobs<Job>::kBlock, 0, stream>>>(jobs);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The splits of the rows that fill the device with strips * splits blocks of a kernel, depending on sizes alone.
template <class Kernel>
int64_t splits_for(Kernel kernel, int threads, int64_t strips, int64_t rows) {
  int resident = 0;
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, 0));
  const int64_t most = std::max<int64_t>(1, ceil_div(rows, kTileRows) / kLeastTiles);
  return std::clamp<int64_t>(multiprocessors() * resident / strips, 1, most);
}

// x (T, in), weight (out, in), bias (out,), one dtype; lora_A (r, in), lora_B (out, r) of any floating dtypes. Gives
// y (T, out) and h = drop(x) A^T (T, r), and zeros to LoraShape::h_columns.
std::tuple<Tensor, Tensor> lora_linear(const Tensor& x_tensor, const Tensor& weight, std::optional<Tensor> bias,
                                       const Tensor& lora_A, const Tensor& lora_B, double scaling, double dropout_p,
                                       std::optional<Tensor> seed) {
  const NoGrad no_grad;
  const DeviceGuard device(x_tensor.get_device_index());
  const LoraShape shape = lora_shape(x_tensor, weight, lora_A, lora_B);
  if (!passes_serve(x_tensor, shape))
    return lora_linear_by_products<Cuda>(x_tensor, weight, bias, lora_A, lora_B, scaling, dropout_p, seed);

  const cudaStream_t stream = current_stream(x_tensor);
  const int64_t* key = seed_pointer(seed, dropout_p, x_tensor);
  const uint32_t threshold = dropout_threshold(dropout_p);
  const Dropout dropout = make_dropout(key, threshold);
  const Matrix matrix = as_matrix(x_tensor, "x");
  const Rows<const uint16_t> x = rows_of(matrix);
  const int64_t ranks = padded_rank(shape.rank), padded_in = padded_columns(shape.in);
  const int64_t h_columns = shape.h_columns();
  Tensor h = torch::stable::new_empty(x_tensor, {shape.tokens, h_columns});
  const Tensor padded_h = h_columns == ranks ? h : torch::stable::new_empty(x_tensor, {shape.tokens, ranks});
  Jobs<PackJob> pack;
  const Tensor A = packed(pack, lora_A, x_tensor, ranks, padded_in);
  const Tensor B = packed(pack, lora_B, x_tensor, padded_columns(shape.out), ranks);

  for_type_and_ranks(x_tensor, shape.rank, [&](auto type, auto count) {
    using T = decltype(type);
    constexpr int kRanks = decltype(count)::value;
    launch<T>(pack, stream);
    for_bools(rows_aligned(x), key != nullptr, [&](auto aligned, auto drops) {
      const int64_t blocks = ceil_div(shape.tokens, kDownTiles * kTileRows);
      down_kernel<T, kRanks, decltype(aligned)::value, decltype(drops)::value>
          <<<grid_size(blocks), 32 * kDownWarps, 0, stream>>>(
              x, bits(A), static_cast<int>(padded_in), dropout, static_cast<float>(dropout_scale(threshold)),
              mutable_bits(h), static_cast<int>(shape.rank), static_cast<int>(h_columns),
              h_columns == ranks ? nullptr : mutable_bits(padded_h));
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  Tensor y = base_output<Cuda>(x_tensor, weight, bias, shape);
  const Rows<uint16_t> out = rows_of_new(y);
  for_type_and_ranks(x_tensor, shape.rank, [&](auto type, auto count) {
    constexpr int kRanks = decltype(count)::value;
    const int64_t strips = ceil_div(shape.out, kUpWarps * kTileColumns);
    const int64_t blocks = strips * ceil_div(shape.tokens, kUpTiles * kTileRows);
    for_bools(rows_aligned(out), false, [&](auto aligned, auto) {
      up_kernel<decltype(type), kRanks, decltype(aligned)::value, false>
          <<<grid_size(blocks), 32 * kUpWarps, 0, stream>>>(out, bits(padded_h), bits(B), static_cast<int>(strips), {},
                                                            static_cast<float>(scaling));
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {y, h};
}

// grad (T, out) and what the forward pass took and gave -> the gradients of x (T, in), lora_A and lora_B, the last two
// in their dtypes. Where need_grad_x is false the first is empty, of shape (0,).
std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(const Tensor& grad_tensor, const Tensor& x_tensor,
                                                        const Tensor& h, const Tensor& weight, const Tensor& lora_A,
                                                        const Tensor& lora_B, double scaling, double dropout_p,
                                                        std::optional<Tensor> seed, bool need_grad_x) {
  const NoGrad no_grad;
  const DeviceGuard device(x_tensor.get_device_index());
  const LoraShape shape = lora_shape(x_tensor, weight, lora_A, lora_B);
  if (!passes_serve(x_tensor, shape))
    return lora_linear_backward_by_products<Cuda>(grad_tensor, x_tensor, h, weight, lora_A, lora_B, scaling, dropout_p,
                                                  seed, need_grad_x);

  check_grad_and_h(grad_tensor, h, x_tensor, shape);
  const cudaStream_t stream = current_stream(x_tensor);
  const int64_t* key = seed_pointer(seed, dropout_p, x_tensor);
  const uint32_t threshold = dropout_threshold(dropout_p);
  const Dropout dropout = make_dropout(key, threshold);
  const auto keep_scale = static_cast<float>(dropout_scale(threshold));
  const Matrix x_matrix = as_matrix(x_tensor, "x"), grad_matrix = as_matrix(grad_tensor, "grad");
  const Rows<const uint16_t> x = rows_of(x_matrix), grad = rows_of(grad_matrix);
  const int64_t ranks = padded_rank(shape.rank);
  const int64_t padded_in = padded_columns(shape.in), padded_out = padded_columns(shape.out);
  const auto empty = [&](std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(x_tensor, sizes, dtype);
  };
  Jobs<PackJob> pack;
  const Tensor A = packed(pack, transposed(lora_A), x_tensor, padded_in, ranks);
  const Tensor B = packed(pack, transposed(lora_B), x_tensor, ranks, padded_out);
  const bool h_serves = shape.h_columns() == ranks && h.stride(1) == 1 && h.stride(0) % 8 == 0 &&
                        reinterpret_cast<uintptr_t>(h.const_data_ptr()) % 16 == 0;
  const Tensor padded_h = h_serves ? h : packed(pack, h, x_tensor, shape.tokens, ranks);
  const Tensor q = empty({shape.tokens, ranks}, x_tensor.scalar_type());
  Tensor grad_A = empty({shape.rank, shape.in}, lora_A.scalar_type());
  Tensor grad_B = empty({shape.out, shape.rank}, lora_B.scalar_type());
  Tensor grad_x = need_grad_x ? empty({shape.tokens, shape.in}, x_tensor.scalar_type())
                              : empty({0}, x_tensor.scalar_type());

  for_type_and_ranks(x_tensor, shape.rank, [&](auto type, auto count) {
    using T = decltype(type);
    constexpr int kRanks = decltype(count)::value;
    launch<T>(pack, stream);
    for_bools(rows_aligned(grad), false, [&](auto aligned, auto) {
      const auto kernel = grad_b_kernel<T, kRanks, decltype(aligned)::value>;
      constexpr int kThreads = 32 * kGradBWarps;
      const int64_t strips = ceil_div(padded_out, kGradBWarps * kTileColumns);
      const int64_t splits = splits_for(kernel, kThreads, strips, shape.tokens);
      const Tensor q_partial = empty({strips, shape.tokens, ranks}, ScalarType::Float);
      const Tensor b_partial = empty({splits, ranks, padded_out}, ScalarType::Float);
      kernel<<<grid_size(strips * splits), kThreads, 0, stream>>>(
          grad, bits(padded_h), padded_h.stride(0), bits(B), static_cast<int>(padded_out), static_cast<int>(strips),
          floats(q_partial), floats(b_partial));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      Jobs<ReduceJob> reduce;
      reduce.add({floats(q_partial), strips, shape.tokens * ranks, ranks, static_cast<float>(scaling),
                  mutable_bits(q), kind_of(q), shape.tokens, ranks, ranks, 1});
      reduce.add({floats(b_partial), splits, ranks * padded_out, padded_out, static_cast<float>(scaling),
                  grad_B.mutable_data_ptr(), kind_of(grad_B), shape.rank, shape.out, 1, shape.rank});
      launch<T>(reduce, stream);
    });
  });

  if (need_grad_x) Cuda::mm_into(grad_x, grad_tensor, weight);

  for_type_and_ranks(x_tensor, shape.rank, [&](auto type, auto count) {
    using T = decltype(type);
    constexpr int kRanks = decltype(count)::value;
    constexpr bool kFused = kRanks <= kGradAMaxUpdateRanks;
    const Rows<uint16_t> out = need_grad_x ? rows_of_new(grad_x) : Rows<uint16_t>{};
    for_bools(rows_aligned(x) && (!need_grad_x || rows_aligned(out)), key != nullptr, [&](auto aligned, auto drops) {
      constexpr bool kAligned = decltype(aligned)::value, kDropout = decltype(drops)::value;
      const auto kernel = grad_a_kernel<T, kRanks, kAligned, kDropout>;
      constexpr int kThreads = 32 * kGradAWarps;
      const int64_t strips = ceil_div(padded_in, kGradAWarps * kTileColumns);
      const int64_t splits = splits_for(kernel, kThreads, strips, shape.tokens);
      const Tensor a_partial = empty({splits, ranks, padded_in}, ScalarType::Float);
      kernel<<<grid_size(strips * splits), kThreads, 0, stream>>>(
          x, bits(q), bits(A), static_cast<int>(padded_in), static_cast<int>(strips), dropout, keep_scale,
          kFused ? out : Rows<uint16_t>{}, floats(a_partial));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      if constexpr (!kFused) {
        if (need_grad_x) {
          const int64_t up_strips = ceil_div(shape.in, kUpWarps * kTileColumns);
          const int64_t blocks = up_strips * ceil_div(shape.tokens, kUpTiles * kTileRows);
          up_kernel<T, kRanks, kAligned, kDropout><<<grid_size(blocks), 32 * kUpWarps, 0, stream>>>(
              out, bits(q), bits(A), static_cast<int>(up_strips), dropout, keep_scale);
          STD_CUDA_KERNEL_LAUNCH_CHECK();
        }
      }
      Jobs<ReduceJob> reduce;
      reduce.add({floats(a_partial), splits, ranks * padded_in, padded_in, keep_scale, grad_A.mutable_data_ptr(),
                  kind_of(grad_A), shape.rank, shape.in, shape.in, 1});
      launch<T>(reduce, stream);
    });
  });
  return {grad_x, grad_A, grad_B};
}

}  // namespace
}  // namespace sensilora

STABLE_TORCH_LIBRARY_IMPL(sensilora_C, CUDA, m) {
  m.impl("lora_linear", TORCH_BOX(&sensilora::lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&sensilora::lora_linear_backward));
}
