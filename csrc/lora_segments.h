// What lora_segments checks on every device.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "common.h"
#include "dropout.h"

namespace sensilora {

struct SegmentsShape {
  int64_t tokens, in, out, stack, segments, most_ranks;

  // h has as many columns as the largest rank and up to a multiple of 16, so that kernels read every rank aligned.
  int64_t h_columns() const { return ceil_div(most_ranks, 16) * 16; }
};

// x (T, in), weight (out, in), lora_A (sum of ranks, in), lora_B (out, sum of ranks), one dtype; rows offsets[i] to
// offsets[i + 1] take adapter adapters[i], int64, and a number that is none takes the base layer alone.
inline SegmentsShape segments_shape(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                    const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
                                    const std::vector<double>& dropout_ps, const Tensor& offsets,
                                    const Tensor& adapters) {
  for (const Tensor* tensor : {&x, &weight, &lora_A, &lora_B}) {
    STD_TORCH_CHECK(tensor->dim() == 2, "x, weight, lora_A and lora_B must have 2 dimensions");
    STD_TORCH_CHECK(tensor->scalar_type() == x.scalar_type(), "x, weight, lora_A and lora_B must share a dtype");
  }
  STD_TORCH_CHECK(scalings.size() == ranks.size() && dropout_ps.size() == ranks.size(),
                  "ranks, scalings and dropout_ps must have one entry an adapter");
  SegmentsShape shape{x.size(0), x.size(1), weight.size(0), 0, adapters.size(0), 0};
  for (size_t i = 0; i < ranks.size(); ++i) {
    STD_TORCH_CHECK(ranks[i] >= 0, "ranks must not be negative");
    check_dropout(dropout_ps[i]);
    shape.stack += ranks[i];
    shape.most_ranks = std::max(shape.most_ranks, ranks[i]);
  }
  STD_TORCH_CHECK(weight.size(1) == shape.in, "weight has ", weight.size(1), " columns, x has ", shape.in);
  STD_TORCH_CHECK(lora_A.size(0) == shape.stack && lora_A.size(1) == shape.in, "lora_A must have shape (", shape.stack,
                  ", ", shape.in, ")");
  STD_TORCH_CHECK(lora_B.size(0) == shape.out && lora_B.size(1) == shape.stack, "lora_B must have shape (", shape.out,
                  ", ", shape.stack, ")");
  for (const Tensor* tensor : {&offsets, &adapters})
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->scalar_type() == ScalarType::Long && tensor->is_contiguous() &&
                        tensor->is_cuda() == x.is_cuda() && tensor->get_device_index() == x.get_device_index(),
                    "offsets and adapters must be contiguous 1-D int64 tensors on x's device");
  STD_TORCH_CHECK(offsets.size(0) == shape.segments + 1, "offsets must have one entry more than adapters");
  return shape;
}

inline void check_segments_bias(const Tensor& bias, const SegmentsShape& shape) {
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == shape.out, "bias must have shape (", shape.out, ",)");
}

inline void check_segments_grad_and_h(const Tensor& grad, const Tensor& h, const Tensor& x,
                                      const SegmentsShape& shape) {
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == shape.tokens && grad.size(1) == shape.out &&
                      grad.scalar_type() == x.scalar_type(),
                  "grad must have shape (", shape.tokens, ", ", shape.out, ") and x's dtype");
  STD_TORCH_CHECK(h.dim() == 2 && h.size(0) == shape.tokens && h.size(1) == shape.h_columns() &&
                      h.scalar_type() == x.scalar_type(),
                  "h must have shape (", shape.tokens, ", ", shape.h_columns(), ") and x's dtype");
}

inline const int64_t* int64_data(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }

// The mask's key, as seed_pointer gives it; null where no adapter drops anything.
inline const int64_t* segments_seed(const std::optional<Tensor>& seed, const std::vector<double>& dropout_ps,
                                    const Tensor& x) {
  const auto largest = std::max_element(dropout_ps.begin(), dropout_ps.end());
  return seed_pointer(seed, largest == dropout_ps.end() ? 0.0 : *largest, x);
}

}  // namespace sensilora
