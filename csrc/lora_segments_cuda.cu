// lora_segments on CUDA without Triton: the products with W are cuBLAS's, and lora_segments_kernels.cuh says how the
// adapters' part is added. Nothing about the segments is read on the host.
#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda_common.cuh"
#include "dropout.h"
#include "lora_segments.h"
#include "lora_segments_kernels.cuh"
#include "products_cuda.cuh"

namespace sensilora {
namespace {

// Blocks a multiprocessor has of the kernel that sums over stretches, about, and stretches that pay for its partial
// sums.
constexpr int64_t kResidentBlocks = 8, kLeastStretches = 4;

// Calls fn with the type that the kernels are compiled for.
template <class Fn>
void for_numbers(const Tensor& x, const Fn& fn) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return fn(float{});
    case ScalarType::Double: return fn(double{});
    case ScalarType::BFloat16: return fn(Bfloat16Bits{});
    case ScalarType::Half: return fn(HalfBits{});
    default: STD_TORCH_CHECK(false, "x must be float32, float64, bfloat16 or float16");
  }
}

template <class Element>
Strided<const Element> strided(const Tensor& matrix) {
  return {static_cast<const Element*>(matrix.const_data_ptr()), matrix.stride(0), matrix.stride(1)};
}
template <class Element>
Strided<Element> mutable_strided(const Tensor& matrix) {
  return {static_cast<Element*>(matrix.mutable_data_ptr()), matrix.stride(0), matrix.stride(1)};
}

// The passes of one call; holds the memory of what is known about its segments on the device.
class Passes {
 public:
  Passes(const SegmentsShape& shape, const Tensor& x, const std::vector<int64_t>& ranks,
         const std::vector<double>& scalings, const std::vector<double>& dropout_ps, const Tensor& offsets,
         const Tensor& adapters, const int64_t* seed)
      : shape_(shape),
        count_(static_cast<int>(ranks.size())),
        stretches_(ceil_div(shape.tokens, kStretchRows) + shape.segments),
        seed_(seed),
        stream_(current_stream(x)),
        table_(table_on_device(x, ranks, scalings, dropout_ps)),
        plan_(torch::stable::new_empty(x, {2 * stretches_ + count_ + 1}, ScalarType::Long)) {
    STD_TORCH_CHECK(shape.stack <= 0x7FFFFFFF, "the ranks sum to ", shape.stack, "; at most 2^31 - 1 can be served");
    for (const int64_t rank : ranks) outer_blocks_ += ceil_div(rank, kStretchRows);
    const Segments segments{int64_data(offsets), int64_data(adapters), shape.segments, shape.tokens};
    auto* starts = const_cast<int64_t*>(plan_starts());
    auto* stretches = const_cast<Stretch*>(plan_stretches());
    plan_kernel<<<1, kPlanThreads, 0, stream_>>>(segments, table(), count_, starts, stretches, stretches_);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // A new (tokens, h_columns) of factor * drop(x) matrix^T. Matrices (stack, columns) have neighbouring columns side by
  // side, as stacks of B do not: the kernels would read them one by one at every stretch.
  Tensor down(const Tensor& x, const Tensor& matrix, bool scaled, bool drops) const {
    Tensor h = torch::stable::new_empty(x, {shape_.tokens, shape_.h_columns()});
    const int64_t chunks = ceil_div(shape_.most_ranks, kSegmentsColumns);
    for_numbers(x, [&](auto type) {
      using T = decltype(type);
      using Element = typename Numbers<T>::Element;
      segments_down_kernel<T><<<grid_size(stretches_ * chunks), kSegmentsThreads, 0, stream_>>>(
          plan(scaled, drops), strided<Element>(x), x.size(1), strided<Element>(matrix), static_cast<int>(chunks),
          mutable_strided<Element>(h));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
    return h;
  }

  // out += factor * kept∘(h matrix).
  void up(const Tensor& out, const Tensor& h, const Tensor& matrix, bool scaled, bool drops) const {
    const int64_t strips = ceil_div(out.size(1), kSegmentsColumns);
    if (strips == 0) return;
    for_numbers(out, [&](auto type) {
      using T = decltype(type);
      using Element = typename Numbers<T>::Element;
      segments_up_kernel<T><<<grid_size(stretches_ * strips), kSegmentsThreads, 0, stream_>>>(
          plan(scaled, drops), strided<Element>(h), strided<Element>(matrix), static_cast<int>(strips),
          mutable_strided<Element>(out), out.size(1));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }

  // to (stack, columns of x) = factor * h^T drop(x) by adapter.
  void outer(const Tensor& to, const Tensor& h, const Tensor& x, bool scaled, bool drops) const {
    const int64_t columns = x.size(1), strips = ceil_div(columns, kSegmentsColumns);
    const int64_t chunks = ceil_div(shape_.most_ranks, kStretchRows);
    if (strips == 0) return;
    // By the batch's size alone, as nobody knows here how many rows an adapter has.
    const int64_t splits = std::clamp<int64_t>(multiprocessors() * kResidentBlocks / (strips * outer_blocks_), 1,
                                               std::max<int64_t>(1, stretches_ / kLeastStretches));
    for_numbers(x, [&](auto type) {
      using T = decltype(type);
      using Element = typename Numbers<T>::Element;
      using Sum = typename Numbers<T>::Sum;
      const Tensor partial =
          torch::stable::new_empty(x, {splits, shape_.stack, columns},
                                   std::is_same_v<Sum, double> ? ScalarType::Double : ScalarType::Float);
      segments_outer_kernel<T><<<grid_size(strips * splits * chunks * count_), kSegmentsThreads, 0, stream_>>>(
          plan(scaled, drops), strided<Element>(h), strided<Element>(x), columns, static_cast<int>(strips),
          static_cast<int>(splits), static_cast<int>(chunks), shape_.stack,
          static_cast<Sum*>(partial.mutable_data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      const int64_t blocks = ceil_div(shape_.stack * columns, kSegmentsThreads);
      segments_sum_kernel<T><<<grid_size(blocks), kSegmentsThreads, 0, stream_>>>(
          static_cast<const Sum*>(partial.const_data_ptr()), splits, shape_.stack, columns,
          mutable_strided<Element>(to));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }

 private:
  static Tensor table_on_device(const Tensor& x, const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
                                const std::vector<double>& dropout_ps) {
    std::vector<Adapter> table;
    int64_t first = 0;
    for (size_t i = 0; i < ranks.size(); ++i) {
      const uint32_t threshold = dropout_threshold(dropout_ps[i]);
      table.push_back({scalings[i], dropout_scale(threshold), static_cast<int32_t>(first),
                       static_cast<int32_t>(ranks[i]), threshold, 0});
      first += ranks[i];
    }
    static_assert(sizeof(Adapter) % sizeof(int64_t) == 0, "");
    std::vector<int64_t> words(table.size() * sizeof(Adapter) / sizeof(int64_t));
    std::memcpy(words.data(), table.data(), words.size() * sizeof(int64_t));
    return words_on_device(words, x);
  }

  const Adapter* table() const { return static_cast<const Adapter*>(table_.const_data_ptr()); }
  const Stretch* plan_stretches() const { return static_cast<const Stretch*>(plan_.const_data_ptr()); }
  const int64_t* plan_starts() const { return int64_data(plan_) + 2 * stretches_; }
  SegmentsPlan plan(bool scaled, bool drops) const {
    return {table(), plan_stretches(), plan_starts(), drops ? seed_ : nullptr, scaled};
  }

  SegmentsShape shape_;
  int count_;
  int64_t stretches_, outer_blocks_ = 0;
  const int64_t* seed_;
  cudaStream_t stream_;
  Tensor table_, plan_;
};

bool adapts(const SegmentsShape& shape) { return shape.tokens > 0 && shape.stack > 0 && shape.segments > 0; }

// What segments_shape says, and bias (out,) in x's dtype. Gives y (T, out) and h (T, SegmentsShape::h_columns), of
// which a row holds drop(x) A^T in as many columns as its adapter's rank.
std::tuple<Tensor, Tensor> lora_segments(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                         const Tensor& lora_A, const Tensor& lora_B, std::vector<int64_t> ranks,
                                         std::vector<double> scalings, std::vector<double> dropout_ps,
                                         const Tensor& offsets, const Tensor& adapters, std::optional<Tensor> seed) {
  const NoGrad no_grad;
  const DeviceGuard device(x.get_device_index());
  const SegmentsShape shape =
      segments_shape(x, weight, lora_A, lora_B, ranks, scalings, dropout_ps, offsets, adapters);
  const int64_t* key = segments_seed(seed, dropout_ps, x);
  Tensor y = torch::stable::new_empty(x, {shape.tokens, shape.out});
  if (bias.has_value()) {
    check_segments_bias(*bias, shape);
    addmm_into_cuda(y, *bias, x, transposed(weight), 1.0, 1.0);
  } else {
    mm_into_cuda(y, x, transposed(weight));
  }
  if (!adapts(shape)) return {y, torch::stable::new_empty(x, {shape.tokens, shape.h_columns()})};
  const Passes passes(shape, x, ranks, scalings, dropout_ps, offsets, adapters, key);
  const Tensor h = passes.down(x, torch::stable::contiguous(lora_A), false, true);
  passes.up(y, h, torch::stable::contiguous(transposed(lora_B)), true, false);
  return {y, h};
}

// grad (T, out) and what the forward pass took and gave -> the gradients of x (T, in), lora_A and lora_B; zero for
// adapters without rows. Where need_grad_x is false the first is empty, of shape (0,).
std::tuple<Tensor, Tensor, Tensor> lora_segments_backward(
    const Tensor& grad, const Tensor& x, const Tensor& h, const Tensor& weight, const Tensor& lora_A,
    const Tensor& lora_B, std::vector<int64_t> ranks, std::vector<double> scalings, std::vector<double> dropout_ps,
    const Tensor& offsets, const Tensor& adapters, std::optional<Tensor> seed, bool need_grad_x) {
  const NoGrad no_grad;
  const DeviceGuard device(x.get_device_index());
  const SegmentsShape shape =
      segments_shape(x, weight, lora_A, lora_B, ranks, scalings, dropout_ps, offsets, adapters);
  check_segments_grad_and_h(grad, h, x, shape);
  const int64_t* key = segments_seed(seed, dropout_ps, x);
  Tensor grad_x = torch::stable::new_empty(x, {0});
  if (need_grad_x) {
    grad_x = torch::stable::new_empty(x, {shape.tokens, shape.in});
    mm_into_cuda(grad_x, grad, weight);
  }
  if (!adapts(shape))
    return {grad_x, torch::stable::new_zeros(x, {shape.stack, shape.in}),
            torch::stable::new_zeros(x, {shape.out, shape.stack})};
  Tensor grad_A = torch::stable::new_empty(x, {shape.stack, shape.in});
  Tensor grad_B = torch::stable::new_empty(x, {shape.out, shape.stack});
  const Passes passes(shape, x, ranks, scalings, dropout_ps, offsets, adapters, key);
  const Tensor q = passes.down(grad, torch::stable::contiguous(transposed(lora_B)), true, false);  // s dY B
  if (need_grad_x) passes.up(grad_x, q, torch::stable::contiguous(lora_A), false, true);
  passes.outer(grad_A, q, x, false, true);
  passes.outer(transposed(grad_B), h, grad, true, false);
  return {grad_x, grad_A, grad_B};
}

}  // namespace
}  // namespace sensilora

STABLE_TORCH_LIBRARY_IMPL(sensilora_C, CUDA, m) {
  m.impl("lora_segments", TORCH_BOX(&sensilora::lora_segments));
  m.impl("lora_segments_backward", TORCH_BOX(&sensilora::lora_segments_backward));
}
