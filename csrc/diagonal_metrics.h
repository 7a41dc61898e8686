// The argument rules of diagonal_metrics, which all its implementations follow.
#pragma once

#include <tuple>
#include <vector>

#include "common.h"

namespace sensilora {

// diags, at least one, each (m,), all float32, bfloat16 or float16 and on one device; counts, how many of the largest values of each
// to average, in [1, m]; alpha in (0, 1]. Gives (trace float64, mean of the largest float64, effective rank int64), each
// with an element a diagonal, where the effective rank is the smallest j whose j largest values sum to at least
// alpha * trace, and 0 where the trace is 0. Sums are exact and rounded once. An empty diagonal gives zeros. A NaN or
// Inf gives effective rank -1, else a negative value -2; so the caller words the error.
using DiagonalMetrics = std::tuple<Tensor, Tensor, Tensor>;
constexpr int kNonFiniteDiagonal = -1, kNegativeDiagonal = -2;

inline void check_diagonals(const std::vector<Tensor>& diags, const std::vector<int64_t>& counts, double alpha) {
  STD_TORCH_CHECK(diags.size() == counts.size(), "there must be a count for each of ", diags.size(), " diags, not ",
                  counts.size());
  STD_TORCH_CHECK(alpha > 0 && alpha <= 1, "alpha must be in (0, 1], not ", alpha);
  const ScalarType type = diags[0].scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "diags must be float32, bfloat16 or float16");
  for (size_t i = 0; i < diags.size(); ++i) {
    const int64_t size = diags[i].numel();
    STD_TORCH_CHECK(diags[i].dim() == 1, "diags must have 1 dimension, not ", diags[i].dim());
    STD_TORCH_CHECK(diags[i].scalar_type() == type, "diags must share a dtype");
    STD_TORCH_CHECK(size == 0 || (counts[i] >= 1 && counts[i] <= size), "count must be in [1, ", size, "], not ",
                    counts[i]);
  }
}

}  // namespace sensilora
