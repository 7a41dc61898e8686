// fisher_diag on CUDA, but for what fisher_diag_hopper_cuda.cu serves: fisher_diag_kernels.cuh says how. The tiles of
// small matrices do not fill the device; their sequences are then divided among splits, whose partial results are added
// by another launch.
#include <algorithm>
#include <vector>

#include "cuda_common.cuh"
#include "fisher_diag.h"
#include "fisher_diag_hopper.h"
#include "fisher_diag_kernels.cuh"

namespace sensilora {
namespace {

// The sequences of a call: their ends, unless all have one length, and the first of each split and of none.
struct Plan {
  std::vector<int64_t> ends, bounds;
  int64_t length = 0;
};

Plan plan_positions(int64_t tokens, int64_t length, int64_t most_splits) {
  Plan plan;
  plan.length = length;
  const int64_t count = ceil_div(tokens, length), splits = std::clamp<int64_t>(count, 1, most_splits);
  for (int64_t split = 0; split <= splits; ++split) plan.bounds.push_back(count * split / splits);
  return plan;
}

// The splits have about the same number of tokens each.
Plan plan_sequences(const FisherInput& input, int64_t most_splits) {
  Plan plan;
  int64_t tokens = 0;
  for (int64_t n = 0; n < input.sequences; ++n) {
    tokens += input.lengths[n];
    if (input.lengths[n] > 0) plan.ends.push_back(tokens);
  }
  const auto count = static_cast<int64_t>(plan.ends.size());
  const int64_t splits = std::clamp<int64_t>(count, 1, most_splits);
  plan.bounds.push_back(0);
  for (int64_t split = 1; split < splits; ++split) {
    const auto first = std::upper_bound(plan.ends.begin(), plan.ends.end(), tokens / splits * split);
    plan.bounds.push_back(std::max<int64_t>(plan.bounds.back(), first - plan.ends.begin()));
  }
  plan.bounds.push_back(count);
  return plan;
}

template <class Element>
TokenRows<Element> token_rows(const Matrix& matrix) {
  STD_TORCH_CHECK(matrix.columns < 0x7FFF0000, "x and grad have too many columns");
  return {matrix.row<Element>(0), matrix.stride, static_cast<int>(matrix.columns)};
}

template <class Element>
bool aligned(const TokenRows<Element>& rows) {
  constexpr int64_t kVector = 16 / sizeof(Element);
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride % kVector == 0 && rows.columns % kVector == 0;
}

template <class Tile>
void run(const FisherInput& input, const Tensor& out, bool accumulate) {
  using Element = typename Tile::Element;
  using Sum = typename Tile::Sum;
  const cudaStream_t stream = current_stream(out);
  const TokenRows<Element> g = token_rows<Element>(input.g), x = token_rows<Element>(input.x);
  const int64_t row_tiles = ceil_div(g.columns, Tile::kRows), column_tiles = ceil_div(x.columns, Tile::kColumns);
  const int64_t tiles = row_tiles * column_tiles, most_splits = std::max<int64_t>(1, multiprocessors() / tiles);
  Plan plan = Tile::kSquares ? plan_positions(input.x.rows, Tile::kTokensAtOnce, most_splits)
                             : plan_sequences(input, most_splits);
  const auto splits = static_cast<int64_t>(plan.bounds.size()) - 1;
  const auto count = static_cast<int64_t>(plan.ends.size());
  std::vector<int64_t> words = plan.bounds;
  words.insert(words.end(), plan.ends.begin(), plan.ends.end());
  const Tensor on_device = words_on_device(words, out);
  const auto* bounds = static_cast<const int64_t*>(on_device.const_data_ptr());
  const Sequences sequences{count > 0 ? bounds + splits + 1 : nullptr, plan.length, input.x.rows};

  const FisherOut whole{out.mutable_data_ptr(), out.scalar_type() == ScalarType::Double, accumulate, out.numel()};
  constexpr bool kDouble = std::is_same_v<Sum, double>;
  Tensor partial = out;
  FisherOut part = whole;
  if (splits > 1) {
    partial = torch::stable::new_empty(out, {splits, out.size(0), out.size(1)},
                                       kDouble ? ScalarType::Double : ScalarType::Float);
    part = {partial.mutable_data_ptr(), kDouble, false, out.numel()};
  }
  const auto kernel = aligned(g) && aligned(x) ? fisher_diag_kernel<Tile, true> : fisher_diag_kernel<Tile, false>;
  kernel<<<grid_size(splits * tiles), kFisherThreads, 0, stream>>>(
      g, x, sequences, bounds, static_cast<int>(row_tiles), static_cast<int>(column_tiles), part);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (splits == 1) return;
  fisher_sum_kernel<Sum><<<grid_size(ceil_div(out.numel(), kFisherThreads)), kFisherThreads, 0, stream>>>(
      static_cast<const Sum*>(partial.const_data_ptr()), splits, whole);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void fisher_diag(const Tensor& x, const Tensor& grad, const Tensor& lengths, int64_t mode, Tensor out,
                 bool accumulate) {
  const NoGrad no_grad;
  const DeviceGuard device(x.get_device_index());
  const FisherInput input = fisher_input(x, grad, lengths, mode, out);
  if (out.numel() == 0) return;
  const bool squares = mode == kPerPosition;
  if (!squares && fisher_diag_hopper(input, out, accumulate)) return;
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return squares ? run<MmaTile<Bfloat16Bits, 2>>(input, out, accumulate)
                     : run<MmaTile<Bfloat16Bits, 0>>(input, out, accumulate);
    case ScalarType::Half:
      return squares ? run<MmaTile<HalfBits, 3>>(input, out, accumulate)
                     : run<MmaTile<HalfBits, 0>>(input, out, accumulate);
    case ScalarType::Float:
      return squares ? run<FmaTile<float, true>>(input, out, accumulate)
                     : run<FmaTile<float, false>>(input, out, accumulate);
    case ScalarType::Double:
      return squares ? run<FmaTile<double, true>>(input, out, accumulate)
                     : run<FmaTile<double, false>>(input, out, accumulate);
    default: STD_TORCH_CHECK(false, "x must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace
}  // namespace sensilora

STABLE_TORCH_LIBRARY_IMPL(sensilora_C, CUDA, m) { m.impl("fisher_diag", TORCH_BOX(&sensilora::fisher_diag)); }
